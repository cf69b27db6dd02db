"""A student, its teacher and perhaps a baseline, compared on the student's data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.data import data_preparation
from recbole.evaluator.register import metrics_dict
from recbole.utils import EvaluatorType, ModelType, init_seed
from torch import Tensor

from recbole_rcekd.compat.habits import EVAL_BATCH_SIZE
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings, read_settings
from recbole_rcekd.core.top_k import CELLS_AT_A_TIME, RowRanking, top_k
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.data.contexts import Rows, is_sequential
from recbole_rcekd.data.fingerprint import split_hash
from recbole_rcekd.data.sequence_dataset import create_dataset
from recbole_rcekd.evaluation.comparison import Comparison, quartile_groups, transfer_ratio
from recbole_rcekd.evaluation.held_out import HeldOutResult, held_out_result, shared_with_teacher
from recbole_rcekd.evaluation.tables import OF_LISTS
from recbole_rcekd.losses import CELoss, RCELoss
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.ce import CESettings
from recbole_rcekd.losses.methods import prefix_of
from recbole_rcekd.losses.rce import RCESettings
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import CheckpointTeacher, own_config, read_teacher
from recbole_rcekd.teachers.load import load_teacher
from recbole_rcekd.teachers.rescale import rescaled
from recbole_rcekd.teachers.safe_load import read_checkpoint
from recbole_rcekd.training.diagnostics import NDCG_AT
from recbole_rcekd.training.run_settings import RUN_KEYS, check_keys, read_trust
from recbole_rcekd.training.sequence_candidates import SequenceCandidates, row_teacher_of

# The keys that an analysis reads. All other settings are those of the student's checkpoint.
_MACHINE_KEYS = ("data_path", "use_gpu", "gpu_id", "device", "show_progress")
_EVALUATION_KEYS = ("metrics", "topk")
_OWN_KEYS = (
    "teacher",
    "student",
    "baseline",
    "history",
    "dataset",
    "output_dir",
    "analyse_users",
    "teacher_trust",
)
_TEACHER_KEYS = ("kd_teacher_scores", "kd_teacher_temperature", *TeacherSettings.keys())
_USED = {
    *(*_MACHINE_KEYS, *_EVALUATION_KEYS, *_OWN_KEYS, *_TEACHER_KEYS),
    *(*CESettings.keys(), *RCESettings.keys()),
}


class _Asked(TeacherScores):
    """A teacher's scores, computed for one block of users at a time.

    Only the scores of the last block are kept, in memory. (In training, the scores of all users are
    kept on disk: ``Teacher.open_scores``.)

    Args:
        teacher: the teacher.
        n_contexts: how many users (or rows of sequences) there are, padding included.
        n_items: how many items there are, padding included.
    """

    def __init__(self, teacher: Teacher, n_contexts: int, n_items: int) -> None:
        self.n_contexts, self.n_items = n_contexts, n_items
        self._teacher = teacher
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def score_all(self, contexts: Tensor) -> Tensor:
        return self._rows(contexts)[0]

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        return self._rows(contexts)[0].gather(1, items.long())

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        listed = self._rows(contexts)[1]
        if unseen:
            listed = listed.clone()
            listed[self._teacher.seen.to(listed.device).cells(contexts)] = -torch.inf
        lists = top_k(listed, k)
        return torch.nn.functional.pad(lists, (0, k - lists.shape[1]))

    def transposed(self) -> TeacherScores:
        raise ValueError("An analysis asks for scores of users, or rows, alone.")

    def _rows(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is None or not torch.equal(self._last[0], contexts):
            self._last = contexts, *self._teacher.scores_and_listed(contexts)
        return self._last[1:]


class ModelAnalysis:
    """The comparison of a student, its teacher and perhaps a baseline, on the student's data.

    Args:
        teacher: the teacher, as for :func:`~recbole_rcekd.evaluation.analysis.analyse`.
        student: the file of the student's checkpoint.
        baseline: the file of the checkpoint of the student trained alone, if there is one.
        users: for how many training users (or rows) all items are scored; 0: all.
        dataset: the name of the dataset; need not be given.
        given: the settings that were given, by key.
        empty_folder: an empty folder, in which RecBole finds no saved datasets.

    Raises:
        SettingsError: a setting is unknown, wrong or without effect, or the data are not found.
        TeacherError: a checkpoint is not usable, or was trained on other data.
    """

    def __init__(
        self,
        teacher: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        student: str,
        baseline: str | os.PathLike[str] | None,
        users: int,
        dataset: str | None,
        given: dict[str, Any],
        empty_folder: str,
    ) -> None:
        trust = read_trust(_here(dataset or "", given))
        content = read_checkpoint(student, trust)
        self.config = config = own_config(content, student)
        here = _here(config["dataset"], given)
        check_keys(here)
        _require_used(here, config)
        if dataset is not None and dataset != config["dataset"]:
            raise SettingsError(
                f"[dataset] is {dataset!r}, but the student in [{student}] was trained on "
                f"[{config['dataset']}]: leave it out, or give a student of that dataset."
            )
        self.n_looked_at = users
        self._empty = empty_folder
        self.losses = _losses(here)
        kd = read_settings(KDSettings, "kd", here.final_config_dict)
        self._prepare_config(here, student)

        init_seed(config["seed"], config["reproducibility"])
        self.train, _, self.test = data_preparation(config, create_dataset(config))
        self.dataset = data = self.train._dataset
        for loss in self.losses.values():
            loss.settings.check_catalogue(int(data.item_num) - 1)
        self.learners: dict[str, Teacher] = {
            "student": CheckpointTeacher(content, data, data, config["device"], student, trust)
        }
        if baseline is not None:
            self.learners["baseline"] = _read_baseline(baseline, self.train, trust)
        settings = read_settings(TeacherSettings, "teacher", here.final_config_dict)
        self.teacher = load_teacher(teacher, self.train, trust, settings)
        by_rows = is_sequential(data)
        n_contexts = len(data) if by_rows and self.teacher.scores_rows else int(data.user_num)
        asked = _Asked(self.teacher, n_contexts, int(data.item_num))
        self.scores = rescaled(
            asked, kd.kd_teacher_scores, kd.kd_teacher_temperature, config["device"]
        )
        self.teaching = (
            row_teacher_of(data, self.scores, self.teacher.scores_rows) if by_rows else None
        )

    def _prepare_config(self, here: Any, student: str) -> None:
        config = self.config
        own = config["data_path"]
        config["data_path"] = here["data_path"] if "data_path" in here.external_config_dict else own
        if not _data_are_at(config):
            # ml-100k is in RecBole's own folder, which may be another one now.
            config["data_path"] = here["data_path"]
        if not _data_are_at(config):
            tried = dict.fromkeys([own, here["data_path"]])
            raise SettingsError(
                f"[data_path]: the student was trained on [{config['dataset']}], which is not in "
                f"{' or '.join(f'[{path}]' for path in tried)}: give --data_path, the folder above "
                f"[{config['dataset']}]."
            )
        if config["eval_type"] != EvaluatorType.RANKING:
            raise SettingsError(
                f"[metrics] of the student in [{student}] are {config['metrics']}, which say "
                "nothing of rankings: analyse a student that was trained with ranking metrics."
            )
        for key in ("device", "use_gpu", "gpu_id"):
            config[key] = here[key]
        for key in _EVALUATION_KEYS:
            if key in here.external_config_dict:
                config[key] = here[key]
        self.metrics = [
            metric.lower() for metric in config["metrics"] if metric.lower() not in OF_LISTS
        ]
        config["metrics"] = [*dict.fromkeys([*self.metrics, "ndcg", *OF_LISTS])]
        config["topk"] = sorted({*config["topk"], NDCG_AT})
        # The analysis ranks all items, even if the student was validated in another mode.
        config["eval_args"]["mode"] = {"valid": "full", "test": "full"}
        for phase in ("valid", "test"):
            config[f"{phase}_neg_sample_args"] = {"distribution": "uniform", "sample_num": "none"}
        config["log_wandb"] = False
        config["checkpoint_dir"] = self._empty
        if config["MODEL_TYPE"] in (ModelType.GENERAL, ModelType.KNOWLEDGE, ModelType.TRADITIONAL):
            config["eval_batch_size"] = EVAL_BATCH_SIZE

    def run(self) -> dict[str, Any]:
        """The content of ``analysis.json``."""
        data = self.dataset
        told = {
            "teacher": self.teacher,
            "baseline": self.learners.get("baseline"),
            "student": self.learners["student"],
        }
        models = {name: model for name, model in told.items() if model is not None}
        tested = {
            name: held_out_result(model, self.config, self.train, self.test)
            for name, model in models.items()
        }
        results = {name: test.result for name, test in tested.items()}
        learned = [name for name in tested if name != "teacher"]
        return {
            "dataset": {
                "name": self.config["dataset"],
                "users": int(data.user_num) - 1,
                "items": int(data.item_num) - 1,
                "split": split_hash(data),
            },
            "metric": str(self.config["valid_metric"]).lower(),
            "models": {
                name: {"model": model.name, "source": model.source}
                for name, model in models.items()
            },
            "test": {
                "n": len(tested["teacher"].users),
                "result": results,
                f"overlap@{NDCG_AT}": {
                    name: float(shared_with_teacher(tested, name).mean()) for name in learned
                },
                "transfer_ratio": self._transfer_ratios(results),
            },
            "distance": self._distances(),
            "groups": self._groups(tested, learned),
        }

    # -- on training users (or rows) ---------------------------------------------------------------

    def _distances(self) -> dict[str, Any]:
        """Overlap, ranks and closure gap of each student, for the same users and random draws."""
        config, n_items = self.config, int(self.dataset.item_num)
        seen = self.learners["student"].taken.to(config["device"])
        every = (
            seen.contexts()
            if self.teaching is None
            else torch.arange(len(self.dataset), device=config["device"])
        )
        generator = torch.Generator().manual_seed(int(config["seed"]))
        n = min(self.n_looked_at or len(every), len(every))
        # In ascending order, because `_lists` finds their positions by binary search.
        some = every[
            torch.randperm(len(every), generator=generator)[:n].sort().values.to(every.device)
        ]
        found: dict[str, Any] = {
            "of": "users" if self.teaching is None else "rows",
            "n": n,
            "of_all": len(every),
        }
        comparisons = {name: Comparison(self.losses, n_items) for name in self.learners}
        draws = {
            name: torch.Generator(config["device"]).manual_seed(int(config["seed"]))
            for name in self.learners
        }
        for ids in torch.split(some, max(1, CELLS_AT_A_TIME // n_items)):
            for name, learner in self.learners.items():
                rows = self._rows(learner, ids)
                candidates = self._lists(ids, rows, draws[name])
                comparisons[name].add(candidates, candidates.mask_rows(rows))
        found["n_told"] = comparisons["student"].n
        return found | {name: comparison.metrics() for name, comparison in comparisons.items()}

    def _rows(self, learner: Teacher, ids: Tensor) -> Tensor:
        """A student's scores of all items for training users, or rows, ``[n, n_items]``."""
        if self.teaching is not None and not learner.scores_rows:
            ids = self.dataset.inter_feat[self.dataset.uid_field].to(ids.device)[ids]
        return learner.score_all(ids)

    def _lists(self, ids: Tensor, rows: Tensor, generator: torch.Generator) -> Candidates:
        by_rows = self.teaching is not None

        def rows_of(contexts: Tensor) -> Tensor:
            return rows[contexts if by_rows else torch.searchsorted(ids, contexts)]

        def score(contexts: Tensor, items: Tensor) -> Tensor:
            return rows_of(contexts).gather(1, items)

        more: dict[str, Any] = {"score": score, "score_all": rows_of}
        ranking = RowRanking(rows_of, rows.shape[1])
        if self.teaching is None:
            return Candidates(
                ids,
                self.scores,
                ranking,
                self.learners["student"].taken.to(ids.device),
                generator,
                **more,
            )
        return SequenceCandidates(
            ids, self.teaching, Rows(self.dataset).inputs(ids), ranking, generator, **more
        )

    # -- on the test set ---------------------------------------------------------------------------

    def _transfer_ratios(
        self, results: Mapping[str, Mapping[str, float]]
    ) -> dict[str, float | None]:
        if "baseline" not in results:
            return {}
        student, alone, teacher = (results[name] for name in ("student", "baseline", "teacher"))
        names = [name for name in student if not name.startswith(OF_LISTS)]
        bigger = {name: not metrics_dict[name.partition("@")[0]].smaller for name in names}
        return {
            name: transfer_ratio(student[name], alone[name], teacher[name], bigger[name])
            for name in names
        }

    def _groups(
        self, tested: Mapping[str, HeldOutResult], learned: Sequence[str]
    ) -> list[dict[str, Any]]:
        """NDCG, overlap and transfer ratio of users, in groups by length of training history."""
        histories = self.learners["student"].taken.counts()[tested["teacher"].users]
        groups = []
        for low, high, members in quartile_groups(histories):
            ndcg = {name: float(test.ndcg[members].mean()) for name, test in tested.items()}
            group: dict[str, Any] = {
                "history": [low, high],
                "n": int(members.sum()),
                f"ndcg@{NDCG_AT}": ndcg,
            }
            group[f"overlap@{NDCG_AT}"] = {
                name: float(shared_with_teacher(tested, name)[members].mean()) for name in learned
            }
            if "baseline" in ndcg:
                group["transfer_ratio"] = transfer_ratio(
                    ndcg["student"], ndcg["baseline"], ndcg["teacher"]
                )
            groups.append(group)
        return groups


def _here(dataset: str, given: dict[str, Any]) -> Any:
    """A Config of what was given on the command line and in ``config_dict``.

    Its model does not matter.
    """
    return Config("BPR", dataset, config_dict=dict(given))


def _require_used(here: Any, student: Any) -> None:
    """Refuse a key that RecBole or this package knows, but an analysis does not use."""
    known = {*student.final_config_dict, *here.internal_config_dict}
    for key in here.external_config_dict:
        if key not in _USED and (
            key in known or key in RUN_KEYS or key.startswith(("kd_", "teacher_")) or prefix_of(key)
        ):
            raise SettingsError(
                f"[{key}] has no effect on an analysis, in which data, split and models are as the "
                "checkpoints say: leave it out."
            )


def _losses(here: Any) -> dict[str, KDLoss]:
    """The losses of whose candidates the closure gap is measured, by name."""
    given = here.final_config_dict
    losses: dict[str, KDLoss] = {
        which: CELoss(read_settings(CESettings, "loss/ce", {**given, "ce_items": which}))
        for which in ("teacher", "student", "union")
    }
    return {**losses, "rce": RCELoss(read_settings(RCESettings, "loss/rce", given))}


def _data_are_at(config: Any) -> bool:
    name = config["dataset"]
    files = [f"{name}.{part}.inter" for part in config["benchmark_filename"] or []] or [
        f"{name}.inter"
    ]
    return all((Path(config["data_path"]) / file).is_file() for file in files)


def _read_baseline(source: str | os.PathLike[str], train: Any, trust: bool) -> Teacher:
    try:
        return read_teacher(os.fspath(source), train, trust)
    except TeacherError as error:
        raise TeacherError(f"[baseline] cannot be compared with this student. {error}") from error
