"""Searches the settings of each method with RecBole's ``HyperTuning``, on the validation data.

Every method gets the same number of trials. All trials share one split, one teacher and its stored
scores. Finished trials are kept and found again, so that an interrupted search can go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import resources
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml
from recbole.trainer import HyperTuning
from recbole.utils import set_color
from tabulate import tabulate

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.files import write_whole
from recbole_rcekd.experiment import DIVERGED, Experiment
from recbole_rcekd.losses.methods import Method
from recbole_rcekd.training.config import command_config

# The environment variable with the seed of hyperopt's choice of trials.
_SEED = "HYPEROPT_FMIN_SEED"


class TuningContext:
    """The data and the teacher that all trials share.

    They are read with the first trial, once in each process.

    Args:
        arguments: arguments of :func:`~recbole_rcekd.quick_start.run_recbole_kd`: ``model``,
            ``dataset``, ``config_file_list``, ``config_dict``, ``teacher`` and ``kd_loss``.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._experiment: Experiment | None = None
        self._prepared: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without data and teacher, for a copy in another process."""
        return {**vars(self), "_experiment": None, "_prepared": None}

    @property
    def experiment(self) -> Experiment:
        """The experiment of the trials. Its settings are checked; no data are read for it."""
        if self._experiment is None:
            given = dict(self._arguments)
            model, dataset, files, extra = (
                given.pop(key, None)
                for key in ("model", "dataset", "config_file_list", "config_dict")
            )
            self._experiment = Experiment(
                command_config(model, dataset, files, extra, given), saved=False
            )
        return self._experiment

    def prepared(self) -> tuple[Experiment, Any, Any, Any]:
        """The experiment of the trials, its data, its teacher and its report."""
        if self._prepared is None:
            self._prepared = (self.experiment, *self.experiment.prepare())
        prepared: tuple[Experiment, Any, Any, Any] = self._prepared
        return prepared


# The validation score of a trial whose training diverges; JSON has no infinity.
_WORST = 1e9


class Objective:
    """One trial, as an objective function for RecBole's ``HyperTuning``.

    docs/guides/tuning.md shows its use with other tools.
    ``Objective("rce", config_file_list=[...])({"rce_weight": 10.0})`` trains one student and
    returns its validation results; the test data are not used.

    Args:
        kd_loss: the method that is tuned.
        folder: where finished trials are kept; ``None``: nowhere.
        context: data and teacher, shared with other objectives; default: a new one, made with
            ``arguments``.
        arguments: the arguments of :class:`TuningContext`.

    Example:
        >>> objective = Objective("rce", config_file_list=["mine.yaml"])  # doctest: +SKIP
        >>> ranges = "properties/hyper/rce.test"
        >>> HyperTuning(objective, params_file=ranges, max_evals=8).run()  # doctest: +SKIP
    """

    def __init__(
        self,
        kd_loss: str,
        folder: Path | None = None,
        context: TuningContext | None = None,
        **arguments: Any,
    ) -> None:
        self.kd_loss = kd_loss
        self.folder = folder
        self.context = context or TuningContext(kd_loss=kd_loss, **arguments)

    def __call__(
        self, config_dict: Mapping[str, Any], config_file_list: Any = None
    ) -> dict[str, Any]:
        """Train with these settings.

        Args:
            config_dict: the settings of this trial.
            config_file_list: not used; ``HyperTuning`` passes it.

        Returns:
            RecBole's keys: ``model``, ``best_valid_score``, ``valid_score_bigger``,
            ``best_valid_result``, and an empty ``test_result``.

        Raises:
            SettingsError: a setting does not exist or does not fit.
        """
        experiment, data, teacher, report = self.context.prepared()
        seed = experiment.seeds[0]
        tried = {key: _plain_number(value) for key, value in config_dict.items()}
        run = experiment.run_of(experiment.runs[self.kd_loss].method, tried)
        config = run.config
        name = hashlib.sha256(
            json.dumps([report.fingerprint(run, teacher), seed]).encode()
        ).hexdigest()[:16]
        file = None if self.folder is None else self.folder / run.method.file_name / f"{name}.json"
        if file is not None and file.exists():
            known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return known
        learns_from, _ = experiment.teacher_of(self.kd_loss, data, teacher, report)
        trainer = experiment.trainer(run, seed, data, learns_from)
        trainer.history.file = None
        try:
            score, result = trainer.fit(
                data.train, data.valid, saved=False, show_progress=config["show_progress"]
            )
        except ValueError as error:
            if str(error) != DIVERGED:
                raise
            getLogger().warning(
                f"{self.kd_loss} with {tried}: the training loss is no number, so this trial is "
                "the worst."
            )
            score, result = -_WORST if config["valid_metric_bigger"] else _WORST, {}
        found = {
            "model": config["model"],
            "best_valid_score": float(score),
            "valid_score_bigger": bool(config["valid_metric_bigger"]),
            "best_valid_result": {key: float(value) for key, value in (result or {}).items()},
            "test_result": {},
            "tried": tried,
            "epochs": len(trainer.history.rows),
        }
        if file is not None:
            write_whole(file, json.dumps(found, indent=1) + "\n")
        return found


def tune_recbole_kd(
    trials: int,
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    teacher: Any = None,
    kd_loss: str | list[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    params_file: str | os.PathLike[str] | None = None,
    algo: str = "exhaustive",
) -> dict[str, Any]:
    """Search the settings of each method of ``kd_loss``, all with the same number of trials.

    Args:
        trials: the number of trials for each method, or as many as its ranges allow.
        model: the student, a RecBole model name; a config file may name it instead.
        dataset: the RecBole dataset name; a config file may name it instead.
        config_file_list: RecBole property files, which may contain KD keys.
        config_dict: RecBole parameters and KD keys.
        teacher: the teacher, as for :func:`~recbole_rcekd.quick_start.run_recbole_kd`.
        kd_loss: the methods; ``scratch`` may be one.
        output_dir: where the folder ``tuning/`` is made, with the trials, ``tuning.json``,
            ``tuning.md`` and ``best.yaml``, a property file with the best settings of all methods.
            Default: nothing is written.
        params_file: ranges in RecBole's format, for one method; default:
            ``properties/hyper/<loss>.test``, and for a sum of losses the ranges of all of them.
        algo: the search of RecBole's ``HyperTuning``: ``exhaustive`` (all combinations of choices,
            in a random order), ``random`` or ``bayes``.

    Returns:
        For each method ``{"best": settings, "best_valid_score": …, "trials": [...]}``.

    Raises:
        SettingsError: hyperopt is not installed, the ranges are missing, or a setting is wrong.
    """
    try:
        import hyperopt  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "[tune] needs hyperopt, as RecBole's HyperTuning does: pip install hyperopt"
        ) from error
    if trials < 1:
        raise SettingsError(
            f"[tune] is {trials}, but must be at least 1, the trials of each method."
        )
    folder = Path(output_dir) / "tuning" if output_dir else None
    arguments = {
        "model": model,
        "dataset": dataset,
        "config_file_list": config_file_list,
        "config_dict": config_dict,
        "teacher": teacher,
        "kd_loss": kd_loss,
    }
    context = TuningContext(**arguments)
    with ExitStack() as files:
        experiment = context.experiment
        if params_file is not None and len(experiment.runs) > 1:
            raise SettingsError(
                "[params_file] has the ranges of one method, but [kd_loss] names several."
            )
        spaces = {
            name: str(params_file)
            if params_file is not None
            else str(_ranges(experiment.runs[name].method, files))
            for name in experiment.runs
        }
        # All ranges are read before a teacher is trained.
        searches = {
            name: _Search(Objective(name, folder, context), space, trials, algo)
            for name, space in spaces.items()
        }
        context.prepared()
        found = {name: search.run() for name, search in searches.items()}
    _write(folder, found)
    getLogger().info(
        f"{trials} trials each, best by {experiment.config['valid_metric']} on the validation "
        f"data\n{_table(found)}"
    )
    return found


class _Search:
    """RecBole's search through the ranges of one method.

    Args:
        objective: the trials of the method.
        space: the file with the ranges.
        trials: the number of trials.
        algo: the search of RecBole's ``HyperTuning``.

    Raises:
        SettingsError: the ranges cannot be read.
    """

    def __init__(self, objective: Objective, space: str, trials: int, algo: str) -> None:
        self._title = f"{objective.kd_loss}, ranges of [{space}]"
        self._tried: list[dict[str, Any]] = []

        def one(config_dict: Mapping[str, Any], config_file_list: Any = None) -> dict[str, Any]:
            self._tried.append(objective(config_dict, config_file_list))
            return self._tried[-1]

        try:
            self._tuning = HyperTuning(
                one, params_file=space, algo=algo, max_evals=trials, early_stop=trials
            )
        except OSError as error:
            raise SettingsError(
                f"[params_file] {space} cannot be read: {error.strerror}."
            ) from error
        except (ValueError, IndexError, SyntaxError, NameError) as error:
            raise SettingsError(
                f"[params_file] {space} has no ranges as RecBole writes them ({error}): a line is "
                "rce_weight choice [1.0,10.0], for example."
            ) from error
        if not self._tuning.space:
            raise SettingsError(
                f"[params_file] {space} has no ranges as RecBole writes them: it is empty."
            )
        self._tuning.max_evals = min(trials, int(self._tuning.max_evals))

    def run(self) -> dict[str, Any]:
        """Make the trials.

        Returns:
            The best settings, their validation score, and all trials.
        """
        getLogger().info(set_color("Tuning", "pink") + f": {self._title}")
        before = os.environ.get(_SEED)
        os.environ[_SEED] = before or "0"
        try:
            self._tuning.run()
        finally:
            if before is None:
                del os.environ[_SEED]
        bigger = max if self._tried[0]["valid_score_bigger"] else min
        best = bigger(self._tried, key=lambda trial: trial["best_valid_score"])
        return {
            "best": best["tried"],
            "best_valid_score": best["best_valid_score"],
            "trials": self._tried,
        }


def _ranges(method: Method, files: ExitStack) -> Path:
    """The file of a method's default ranges; for a sum, a new file with those of all its losses."""
    texts = []
    for part in method.losses or [method.name]:
        file = resources.files("recbole_rcekd.properties") / "hyper" / f"{part}.test"
        if not file.is_file():
            raise SettingsError(
                f"[params_file] is missing: there are no ranges for {part}. Write some as in "
                "properties/hyper/rce.test, and name the file with --params_file."
            )
        if part == method.name:
            return files.enter_context(resources.as_file(file))
        texts.append(file.read_text(encoding="utf-8"))
    folder = files.enter_context(tempfile.TemporaryDirectory())
    joined = Path(folder) / f"{method.file_name}.test"
    joined.write_text("\n".join(texts), encoding="utf-8")
    return joined


def _write(folder: Path | None, found: dict[str, Any]) -> None:
    if folder is None:
        return
    note = "# The best settings of {}, found by run_recbole_kd.py tune on the validation data.\n"
    best: dict[str, Any] = {}
    for name, method in found.items():
        if any(best.get(key, value) != value for key, value in method["best"].items()):
            # For example, rce and rce+freqd may have different best values of rce_weight.
            file = folder / f"best-{name.replace(':', '.')}.yaml"
            write_whole(file, note.format(name) + yaml.safe_dump(method["best"], sort_keys=False))
            getLogger().info(
                f"{name} has other best values than the methods before it: they are in [{file}]."
            )
        else:
            best |= method["best"]
    write_whole(
        folder / "best.yaml", note.format("each method") + yaml.safe_dump(best, sort_keys=False)
    )
    write_whole(folder / "tuning.json", json.dumps(found, indent=1) + "\n")
    write_whole(folder / "tuning.md", _table(found, "github") + "\n")


def _table(found: dict[str, Any], style: str = "simple_outline") -> str:
    rows = [
        [
            name,
            len(method["trials"]),
            f"{method['best_valid_score']:.5f}",
            ", ".join(
                f"{k}: {v:g}" if isinstance(v, float) else f"{k}: {v}"
                for k, v in method["best"].items()
            ),
        ]
        for name, method in found.items()
    ]
    return str(
        tabulate(
            rows,
            ["method", "trials", "best validation score", "with"],
            tablefmt=style,
            disable_numparse=True,
        )
    )


def _plain_number(value: Any) -> Any:
    """A value of hyperopt as a plain number or list, for checkpoints and JSON.

    Hyperopt gives tuples and numbers of numpy.
    """
    return (
        value.item()
        if hasattr(value, "item")
        else list(value)
        if isinstance(value, tuple)
        else value
    )
