"""A command from data to results: one split, one teacher, and a run for each method and seed."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from dataclasses import asdict
from logging import getLogger
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.data import data_preparation
from recbole.utils import ModelType, get_environment, get_model, init_logger, init_seed, set_color

from recbole_rcekd.compat.habits import evaluate_more
from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import KDError, SettingsError
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.settings import TeacherSettings, read_settings
from recbole_rcekd.data.fingerprint import data_files_hash, split_hash
from recbole_rcekd.data.sequence_dataset import create_dataset, way_of_split
from recbole_rcekd.evaluation.evaluate import measure_teacher, ranking_time
from recbole_rcekd.evaluation.report import Report, RunResult, TeacherResult
from recbole_rcekd.losses.methods import Method, read_methods
from recbole_rcekd.models.probe import require_rankable
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.load import load_teacher
from recbole_rcekd.training.config import assistant_config
from recbole_rcekd.training.kd_terms import require_learner
from recbole_rcekd.training.recording import recording_trainer
from recbole_rcekd.training.run_settings import (
    Run,
    RunSettings,
    check_keys,
    overrides_for,
    read_trust,
)
from recbole_rcekd.training.train_teacher import (
    Data,
    course,
    draw_apart,
    found_or_trained,
    require_earlier_states,
    teacher_to_train,
    train_teacher,
)
from recbole_rcekd.training.trainer import distill_trainer

# RecBole's error message when a training diverges (trainer/trainer.py `_check_nan`).
DIVERGED = "Training loss is nan"


class Experiment:
    """One command: one split, one teacher, and a run for each method and seed.

    Args:
        config: the command's Config.
        saved: keep checkpoints.

    Attributes:
        runs: the run of each method, by name.
        seeds: the seeds of the runs.
        teacher_config: the Config of the teacher, if the command trains it.

    Raises:
        SettingsError: a setting of any method is unknown or wrong.
    """

    def __init__(self, config: Any, saved: bool) -> None:
        self.config = config
        self.saved = saved
        self.ranks = Ranks.of(config)
        check_keys(config)
        read_trust(config)
        if config["single_spec"] and int(config["nproc"] or 1) > 1:
            raise SettingsError(
                "[nproc] is read by run_recbole_kd.py from its command line only: --nproc=2."
            )
        methods = read_methods(config["kd_loss"] or "rce")
        self.seeds = _seeds(config)
        self.output_dir = _output_dir(config) if self.ranks.first else None
        if not self.ranks.first:
            config["log_wandb"] = False
        evaluate_more(config)
        _require_validated_metric(config)
        # All settings of all methods are read now, so that an error in the last one is found before
        # hours of training.
        self.runs = {method.name: self.run_of(method) for method in methods}
        if not config["teacher"] and any(method.needs_teacher for method in methods):
            raise SettingsError(
                "[teacher] is missing: give a model name (--teacher=BPR) or the path of a "
                "checkpoint."
            )
        if not all(method.alone for method in methods):
            require_rankable(config.model_class)
            if config["MODEL_TYPE"] == ModelType.TRADITIONAL:
                raise SettingsError(
                    f"[model] {config['model']} is not trained by gradient: it can teach, but not "
                    "learn."
                )
        self.teacher_settings = read_settings(TeacherSettings, "teacher", config.final_config_dict)
        self.teacher_config = teacher_to_train(config, self.teacher_settings)
        if self.teacher_config is not None:
            # An assistant that is not possible is refused before its teacher is trained.
            self._assistant_configs(self.teacher_config)
        for run in self.runs.values():
            require_earlier_states(
                run, config["teacher"], self.teacher_config, self.teacher_settings
            )

    def run(self) -> dict[str, Any]:
        """Train everything, and return the result of :func:`run_recbole_kd`."""
        data, teacher, report = self.prepare()
        try:
            for seed in self.seeds:
                for run in self.runs.values():
                    report.add(self._run(run, seed, data, teacher, report))
        except BaseException:
            if report.runs:
                report.show()  # the runs that were finished
            raise
        logger = getLogger()
        logger.info(
            "The running environment of this training is as follows:\n"
            + get_environment(self.config).draw()
        )
        report.show()
        return report.result(self.config["valid_metric_bigger"])

    def prepare(self) -> tuple[Data, Teacher | None, Report]:
        """Read the data and the teacher, which is trained first if the command must train it.

        Returns:
            The data, the teacher (``None``: there is none) and the report, without runs.
        """
        config = self.config
        init_seed(config["seed"], config["reproducibility"])
        # RecBole checks whether a folder exists and then makes it, which can fail if two commands
        # start together.
        for folder in (Path("log") / config["model"], config["checkpoint_dir"]):
            os.makedirs(folder, exist_ok=True)
        if self.ranks.first:
            init_logger(config)
        logger = getLogger()
        logger.info(sys.argv)
        logger.info(config)
        dataset = create_dataset(config)
        logger.info(dataset)
        data = Data(dataset, *data_preparation(config, dataset))
        if way_of_split(data.train._dataset.config) != way_of_split(config):
            raise SettingsError(
                "[kd_sequence_split]: the data loaders that RecBole kept in "
                f"[{config['checkpoint_dir']}] (save_dataloaders) are split in another way: remove "
                "them."
            )
        if self.ranks.world > min(data.valid.sample_size, data.test.sample_size, self.ranks.world):
            raise SettingsError(
                f"[nproc]: there are fewer users to evaluate than the {self.ranks.world} processes."
            )
        self._require_learner(data)

        teacher = None
        report = Report(
            config,
            self.output_dir,
            split_hash(data.train._dataset),
            data.train._dataset,
            data_files_hash(config),
        )
        if config["teacher"]:
            teacher, report.teacher = self._prepare_teacher(data)
        self.assistant_configs = self._assistant_configs(
            None if teacher is None else teacher.config
        )
        self.assistants: dict[str, tuple[Teacher, dict[str, Any]]] = {}
        return data, teacher, report

    def _require_learner(self, data: Data) -> None:
        """Refuse methods by which the student cannot learn, before the teacher is trained."""
        runs = [run for run in self.runs.values() if not run.method.alone]
        methods = [run.build_losses() for run in runs]
        for losses in methods:
            for loss in losses.values():
                loss.settings.check_catalogue(int(data.dataset.item_num) - 1)
        if self.teacher_config is None or not methods:
            return  # no teacher is trained, so the student's trainer checks this early enough
        config, dataset = runs[0].config, data.train._dataset
        with preserved_random_state():
            model = get_model(config["model"])(config, dataset).to(config["device"])
        scorer = ModelScorer(model, dataset, trainable=True)
        for losses in methods:
            require_learner(scorer, losses, self.ranks)

    # -- teacher -----------------------------------------------------------------------------------

    def _prepare_teacher(self, data: Data) -> tuple[Teacher, TeacherResult]:
        source, trained = self.config["teacher"], dict[str, Any]()
        if self.teacher_config is not None:
            n_states = self.teacher_settings.teacher_checkpoints
            source, trained = train_teacher(self.teacher_config, data, self.ranks, n_states)
        teacher = load_teacher(source, data.train, read_trust(self.config), self.teacher_settings)
        return teacher, measure_teacher(
            teacher, self.config, data.train, data.valid, data.test, trained
        )

    # -- assistants --------------------------------------------------------------------------------

    def _assistant_configs(self, teacher: Any) -> dict[str, Any]:
        """The Configs of the assistants, by method, for the methods that have one.

        Args:
            teacher: the teacher's Config, or ``None`` for a teacher without one.
        """
        found = {
            name: assistant_config(run.config, run.settings, teacher)
            for name, run in self.runs.items()
            if run.settings is not None
        }
        return {name: config for name, config in found.items() if config is not None}

    def teacher_of(
        self, name: str, data: Data, teacher: Teacher | None, report: Report
    ) -> tuple[Teacher | None, dict[str, Any] | None]:
        """The teacher of a method's students, which may be an assistant.

        Args:
            name: the name of the method.
            data: the data, from :meth:`prepare`.
            teacher: the teacher, from :meth:`prepare`.
            report: the report, from :meth:`prepare`.

        Returns:
            The teacher or the assistant, and the assistant's results (``None``: no assistant).
        """
        if teacher is None or name not in self.assistant_configs:
            return teacher, None
        if name not in self.assistants:
            self.assistants[name] = self._prepare_assistant(name, data, teacher, report)
        return self.assistants[name]

    def _prepare_assistant(
        self, name: str, data: Data, teacher: Teacher, report: Report
    ) -> tuple[Teacher, dict[str, Any]]:
        """Train the assistant of a method like its students, or find it, and evaluate it."""
        config, logger = self.assistant_configs[name], getLogger()
        title = set_color(f"Assistant, {name}", "pink")
        run = dataclasses.replace(self.runs[name], config=config)
        key = report.fingerprint(run, teacher)[:10]
        file = (
            Path(config["checkpoint_dir"])
            / f"assistant-{config['model']}-{config['dataset']}-{key}.pth"
        )

        def train() -> tuple[str, dict[str, Any]]:
            size = config["embedding_size"]
            logger.info(
                f"{title}: training {config['model']} with embedding_size {size}, kept in [{file}]"
            )
            trainer = self.trainer(run, int(config["seed"]), data, teacher)
            started = perf_counter()
            trainer.fit(data.train, data.valid, saved=True, show_progress=config["show_progress"])
            return trainer.saved_model_file, course(trainer, perf_counter() - started)

        file, trained = found_or_trained(file, self.ranks, f"{title}:", train)
        assistant = load_teacher(str(file), data.train)
        result = measure_teacher(assistant, self.config, data.train, data.valid, data.test, trained)
        logger.info(f"{title}: " + set_color("test result", "yellow") + f": {result.test_result}")
        return assistant, {"embedding_size": config["embedding_size"], **asdict(result)}

    # -- students ----------------------------------------------------------------------------------

    def run_of(self, method: Method, given: dict[str, Any] | None = None) -> Run:
        """The run of one method: the command's Config with the method's own keys, and KD settings.

        Args:
            method: a method of ``kd_loss``.
            given: further keys, which replace those in the Config.
        """
        config = copy.deepcopy(self.config)
        config["kd_loss"] = method.name
        for key, value in (given or {}).items():
            config[key] = value
        for key, value in overrides_for(method, config).items():
            config[key] = value
        settings = None if method.alone else RunSettings.read(config)
        if settings is not None:
            # Written into the Config, so that log, tensorboard and checkpoint show the settings.
            for key, value in settings.as_dict().items():
                config[key] = value
        return Run(method, config, settings)

    def _run(
        self, run: Run, seed: int, data: Data, teacher: Teacher | None, report: Report
    ) -> RunResult:
        name, config, logger = run.name, run.config, getLogger()
        title = set_color(f"{name}, seed {seed}", "pink")
        known = self.ranks.broadcast(report.finished(run, seed, teacher))
        if known is not None and (known.checkpoint or not self.saved):
            logger.info(f"{title}: finished before, taken from [{known.checkpoint}]")
            return known
        fingerprint = report.fingerprint(run, teacher)
        teacher, assistant = self.teacher_of(name, data, teacher, report)
        logger.info(f"{title}: training {config['model']}")
        trainer = self.trainer(run, seed, data, teacher)
        folder = report.run_folder(name, seed)
        report.make_room(name, seed)
        if folder is not None:
            trainer.history.file = folder / "history.csv"
        started = perf_counter()
        try:
            best_score, best_valid = trainer.fit(
                data.train, data.valid, saved=self.saved, show_progress=config["show_progress"]
            )
        except ValueError as error:
            if str(error) != DIVERGED:
                raise
            raise KDError(
                f"The training loss of {name}, seed {seed}, is no number any more: lower "
                "[learning_rate], or the weights of the method's terms."
            ) from error
        seconds = perf_counter() - started
        test = trainer.evaluate(
            data.test, load_best_model=self.saved, show_progress=config["show_progress"]
        )
        logger.info(f"{title}: " + set_color("best valid", "yellow") + f": {best_valid}")
        logger.info(f"{title}: " + set_color("test result", "yellow") + f": {test}")
        return RunResult(
            loss=name,
            seed=seed,
            settings=_settings_of(run),
            best_valid_score=float(best_score),
            best_valid_result={k: float(v) for k, v in (best_valid or {}).items()},
            test_result={k: float(v) for k, v in test.items()},
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            checkpoint=trainer.saved_model_file if self.saved else "",
            checkpoint_bytes=os.path.getsize(trainer.saved_model_file) if self.saved else 0,
            ranking_ms_per_1000_users=ranking_time(trainer.model, data.train._dataset),
            fingerprint=fingerprint,
            assistant=assistant,
            **course(trainer, seconds),
        )

    def trainer(self, run: Run, seed: int, data: Data, teacher: Teacher | None) -> Any:
        """The trainer of one run, with a new model.

        Args:
            run: the run of the method, from :meth:`run_of`.
            seed: the seed of the initialisation and all random draws.
            data: the data, from :meth:`prepare`.
            teacher: the teacher of the method, from :meth:`teacher_of`.
        """
        # The split is the same for all seeds. Initialisation, negative samples, order of the
        # batches and all other random draws depend on the run's seed.
        config = run.config
        init_seed(seed, config["reproducibility"])
        # The loader of a knowledge-aware model has two loaders in it.
        for loader in (
            data.train,
            *(getattr(data.train, f"{part}_dataloader", None) for part in ("general", "kg")),
        ):
            if hasattr(loader, "generator"):
                if loader.generator is None:  # RecBole removes it from a loader that it saves
                    loader.generator = loader.sampler.generator = torch.Generator()
                loader.generator.manual_seed(seed)
                if self.ranks.world > 1:
                    loader.sampler.seed = seed  # the order of the rows depends on it then
        model = get_model(config["model"])(config, data.train._dataset).to(config["device"])
        getLogger().info(model)
        trainer: Any
        if run.settings is None:
            trainer = recording_trainer(config)(config, model)
        else:
            # A control does not use the teacher, so its runs are the same without one.
            learns_from = teacher if run.method.needs_teacher else None
            trainer = distill_trainer(config)(config, model, learns_from, seed, run.settings)
        draw_apart(config, seed, self.ranks)
        return trainer


def _require_validated_metric(config: Any) -> None:
    """Refuse a ``valid_metric`` that is not measured: students and teacher are compared by it."""
    name, _, k = str(config["valid_metric"]).lower().partition("@")
    lengths = config["topk"] if isinstance(config["topk"], list) else [config["topk"]]
    if name not in [str(metric).lower() for metric in config["metrics"]] or (
        k and k not in map(str, lengths)
    ):
        raise SettingsError(
            f"[valid_metric] is {config['valid_metric']}, but what is measured are "
            f"{', '.join(config['metrics'])} at {', '.join(map(str, lengths))}: choose one of "
            "these, or add it to [metrics] and [topk]."
        )


def _settings_of(run: Run) -> dict[str, Any]:
    """The KD settings of a run, and the RecBole keys that may differ between methods."""
    keys = ("learning_rate", "weight_decay", "train_batch_size", "epochs", "stopping_step")
    used = {key: run.config[key] for key in keys}
    return used if run.settings is None else {**used, **run.settings.as_dict()}


def _output_dir(config: Any) -> Path | None:
    """Make the output folder now, so that an error is found before hours of training."""
    if config["output_dir"] is None:
        return None
    folder = Path(str(config["output_dir"]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"[output_dir] is {str(folder)!r}, which is no folder and cannot be made one: {error}"
        ) from error
    return folder


def _seeds(config: Any) -> list[int]:
    value = config["seeds"]
    if value is None:
        if not isinstance(config["seed"], int):
            raise SettingsError(
                f"[seed] is {config['seed']!r}, but must be one whole number; several are [seeds]."
            )
        return [int(config["seed"])]
    values = list(value) if isinstance(value, (list, tuple, str)) else [value]
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise SettingsError(
            f"[seeds] is {value!r}, but must be whole numbers, as in --seeds=0,1,2."
        )
    if not all(0 <= v < 2**32 for v in values):
        raise SettingsError(
            f"[seeds] is {value!r}, but seeds are from 0 to 2^32 − 1; several are written as 0,1,2."
        )
    if len(set(values)) < len(values):
        raise SettingsError(f"[seeds] is {value!r}, but must name each seed once.")
    return values
