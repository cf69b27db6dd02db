"""Trains the teacher of a command as RecBole would, or finds one with the same settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from time import perf_counter
from typing import Any

from recbole.data import data_preparation
from recbole.utils import get_model, init_seed, set_color

from recbole_rcekd.compat.habits import evaluate_more
from recbole_rcekd.core.distributed import MACHINE_KEYS, Ranks
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.files import write_json
from recbole_rcekd.core.settings import TeacherSettings
from recbole_rcekd.data.fingerprint import data_files_hash, split_hash
from recbole_rcekd.data.sequence_dataset import create_dataset
from recbole_rcekd.models.probe import require_rankable
from recbole_rcekd.teachers.load import kind_of, source_list
from recbole_rcekd.teachers.trajectory import Trajectory, folder_beside, state_files
from recbole_rcekd.training.config import teacher_config
from recbole_rcekd.training.recording import recording_trainer
from recbole_rcekd.training.run_settings import Run

# Keys that do not change the trained teacher.
_UNIMPORTANT = frozenset({*MACHINE_KEYS, "eval_batch_size", "show_progress", "state", "log_wandb"})


@dataclass
class Data:
    """RecBole's dataset and its three loaders.

    Attributes:
        dataset: the dataset, not split.
        train: the loader of the training data.
        valid: the loader of the validation data.
        test: the loader of the test data.
    """

    dataset: Any
    train: Any
    valid: Any
    test: Any


def teacher_to_train(config: Any, settings: TeacherSettings) -> Any:
    """The Config of the teacher that the command must train.

    Args:
        config: the command's Config.
        settings: the settings of its teacher.

    Returns:
        The Config, or ``None`` if ``teacher`` names files or is not given.

    Raises:
        SettingsError: ``teacher`` names neither a model nor a file, or keys of the teacher's
            training have no effect.
        ScoringError: the model cannot teach.
    """
    given = config["teacher"]
    sources = source_list(given) if given else []
    # The name of a RecBole model has neither an ending nor a folder.
    if len(sources) == 1 and not (Path(sources[0]).suffix or os.path.sep in sources[0]):
        try:
            model_class = get_model(sources[0])
        except (ValueError, AttributeError, ImportError) as error:  # it may import lightgbm
            if not kind_of(sources[0]).is_there(sources[0]):
                raise SettingsError(
                    f"[teacher] is {given!r}, which is neither a RecBole model (written as in BPR, "
                    "LightGCN) nor a file."
                ) from error
        else:
            require_rankable(model_class)
            return teacher_config(sources[0], config)
    settings.weights_of(sources)
    missing = [each for each in sources if not kind_of(each).is_there(each)]
    if len(sources) > 1 and missing:
        raise SettingsError(
            f"[teacher] names {len(sources)} teachers, but there is no file [{missing[0]}]: "
            "several teachers are files (checkpoints or files of scores), so train a model by its "
            "name first."
        )
    known = {"teacher_trust", *TeacherSettings.keys()} - {"teacher_checkpoints"}
    stray = [k for k in config.final_config_dict if k.startswith("teacher_") and k not in known]
    stray = [k for k in stray if config[k] is not None]
    if sources and stray:
        raise SettingsError(
            f"[{stray[0]}] has no effect: the teacher in [{given}] is trained already."
        )
    return None


def require_earlier_states(run: Run, source: Any, teacher: Any, settings: TeacherSettings) -> None:
    """Refuse a method that learns from earlier states of a teacher, if the teacher has none.

    Args:
        run: the run of the method.
        source: what ``teacher`` names.
        teacher: the Config of a teacher that will be trained, or ``None``.
        settings: the settings of the teacher.

    Raises:
        SettingsError: there are no earlier states, and none will be kept.
    """
    for loss in run.losses_of_earlier_states():
        if teacher is None or loss.checkpoints:
            state_files(loss, source_list(source))
        elif settings.teacher_checkpoints == 0:
            raise SettingsError(
                f"[kd_loss] {run.name} learns from earlier states of the teacher: say with "
                "[teacher_checkpoints] how many are kept while it is trained, 3 for example."
            )


def train_teacher(
    config: Any, data: Data, ranks: Ranks, n_states: int
) -> tuple[str, dict[str, Any]]:
    """Train a teacher as RecBole would, or find one that was trained before with these settings.

    Args:
        config: the teacher's Config.
        data: the student's data.
        ranks: this process among those that train the teacher.
        n_states: how many earlier states of the teacher are kept.

    Returns:
        The file of the checkpoint, and the time of the training (:func:`course`).
    """
    evaluate_more(config)
    name = config["model"]
    settings = {
        k: repr(v) for k, v in sorted(config.final_config_dict.items()) if k not in _UNIMPORTANT
    }
    if n_states:
        settings["teacher_checkpoints"] = repr(n_states)
    made_of = [settings, split_hash(data.train._dataset), data_files_hash(config)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:10]
    file = Path(config["checkpoint_dir"]) / f"teacher-{name}-{config['dataset']}-{key}.pth"
    file = ranks.broadcast(file)  # other ranks have other settings, so another hash
    states, logger, title = folder_beside(file), getLogger(), set_color("Teacher", "pink")

    def train() -> tuple[str, dict[str, Any]]:
        logger.info(f"{title}: training {name}, kept in [{file}]")
        if ranks.first and not file.exists():
            # They may be left from a training that was interrupted in its last step.
            shutil.rmtree(states, ignore_errors=True)
        logger.info(config)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train_data, valid_data, _ = data_preparation(config, dataset)
        init_seed(config["seed"], config["reproducibility"])
        model = get_model(name)(config, train_data._dataset).to(config["device"])
        logger.info(model)
        trainer = recording_trainer(config)(config, model)
        if n_states and ranks.first:
            trainer.trajectory = Trajectory(folder_beside(trainer.saved_model_file), n_states)
        draw_apart(config, config["seed"], ranks)
        started = perf_counter()
        trainer.fit(train_data, valid_data, saved=True, show_progress=config["show_progress"])
        facts = course(trainer, perf_counter() - started)
        if ranks.first and trainer.trajectory is not None:
            epochs = trainer.trajectory.finish(states)
            logger.info(f"{title}: its states after the epochs {epochs} are kept in [{states}]")
        return trainer.saved_model_file, facts

    file, trained = found_or_trained(
        file, ranks, f"{title}: {name}", train, states.exists() or not n_states
    )
    return str(file), trained


def found_or_trained(
    file: Path,
    ranks: Ranks,
    title: str,
    train: Callable[[], tuple[str, dict[str, Any]]],
    complete: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Find the checkpoint that an earlier command trained, or train it.

    A new checkpoint is moved to its file in the last step, so an interrupted training is not found
    later.

    Args:
        file: the file of the checkpoint. The time of the training is in a ``.json`` beside it.
        ranks: this process among those that train it.
        title: the name in the log.
        train: a function that trains, and returns a checkpoint and the time of the training.
        complete: whether the other files that belong to the checkpoint exist.

    Returns:
        ``file``, and the time of the training.
    """
    facts = file.with_suffix(".json")
    known = _read_facts(facts) if file.exists() and complete else None
    if ranks.all(known is not None) and known is not None:
        getLogger().info(f"{title} trained before, from [{file}]")
        return file, known
    made, trained = train()
    if ranks.first:
        write_json(facts, trained)
        for suffix in (".kd.pth", ".history.csv"):
            beside = Path(made).with_suffix(suffix)
            if beside.exists():
                os.replace(beside, file.with_suffix(suffix))
        os.replace(made, file)
    ranks.barrier()
    return file, trained


def _read_facts(file: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known


def course(trainer: Any, seconds: float) -> dict[str, Any]:
    """The number of epochs and the time of a training.

    Args:
        trainer: the trainer, after the training.
        seconds: the time that ``fit`` took.
    """
    rows = trainer.history.rows
    in_training = sum(row.get("train_seconds", 0.0) for row in rows)
    return {
        "epochs": len(rows),
        "seconds": round(seconds, 3),
        "seconds_per_epoch": round(in_training / max(1, len(rows)), 4),
    }


def draw_apart(config: Any, seed: int, ranks: Ranks) -> None:
    """Seed each rank differently, for negative items and dropout; the first as a single process."""
    if not ranks.first:
        init_seed(ranks.seed(seed), config["reproducibility"])
