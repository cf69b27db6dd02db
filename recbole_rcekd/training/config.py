"""RecBole's Configs of commands, of teachers that are trained, and of assistants."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config
from recbole.utils import EvaluatorType, InputType, ModelType
from recbole.utils.argument_list import (
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
)

from recbole_rcekd.core.distributed import PLACE_KEYS
from recbole_rcekd.core.errors import KDError, SettingsError
from recbole_rcekd.core.settings import nearest
from recbole_rcekd.training.run_settings import RUN_KEYS, RunSettings, known_to_recbole, plain

_NEGATIVES = "train_neg_sample_args"


def command_config(
    model: str | None,
    dataset: str | None,
    config_file_list: list[str] | None,
    config_dict: dict[str, Any] | None,
    given: dict[str, Any],
) -> Any:
    """RecBole's Config of a command.

    Args:
        model: the student, a RecBole model name; ``None``: it is in the settings.
        dataset: the RecBole dataset name; ``None``: it is in the settings.
        config_file_list: RecBole property files.
        config_dict: RecBole parameters and KD keys.
        given: KD keys that were given as arguments, with their values; ``None``: not given.

    Raises:
        SettingsError: RecBole has no such model, or a file is missing or cannot be read.
    """
    extra = {key: _as_text(value) for key, value in given.items() if value is not None}
    settings = {**(config_dict or {}), **extra}
    for file in config_file_list or []:
        if not os.path.isfile(file):
            raise SettingsError(f"[config_files] names [{file}], but there is no such file.")
    try:
        given_negatives = _is_given(_NEGATIVES, config_file_list, settings)
        # RecBole would read these keys from the command line too, and evaluate them as Python.
        with _without_on_the_command_line(extra):
            return _recboles_config(model, dataset, config_file_list, settings, given_negatives)
    except KDError:
        raise
    except ModuleNotFoundError as error:
        # RecBole looks for an unknown name among the models that need these packages.
        if error.name not in ("lightgbm", "xgboost"):
            raise
        name = f": {model!r}" if model else ""
        raise SettingsError(
            f"[model] names no RecBole model{name}, or one that needs the package {error.name}."
        ) from error
    except AttributeError as error:
        raise SettingsError(
            f"[model] is {model!r}, but RecBole's models are written as in BPR, LightGCN."
        ) from error
    except (
        KeyError,
        TypeError,
        ValueError,
        SyntaxError,
        NotImplementedError,
        yaml.YAMLError,
    ) as error:
        raise SettingsError(
            f"RecBole cannot read these settings: {' '.join(str(error).split())}"
        ) from error


def _recboles_config(
    model: str | None,
    dataset: str | None,
    files: list[str] | None,
    settings: dict[str, Any],
    given: bool,
) -> Any:
    """RecBole's Config, with ``train_neg_sample_args: None`` if RecBole asks for that.

    RecBole's sequential models learn from the whole catalogue by default (``loss_type: CE``), but
    then RecBole wants this key to be set.

    Args:
        model: the model; ``None``: it is in the settings.
        dataset: the dataset; ``None``: it is in the settings.
        files: RecBole property files.
        settings: RecBole parameters and KD keys.
        given: the user has set ``train_neg_sample_args``, so it is not changed.
    """
    try:
        return Config(model, dataset, files, settings)
    except ValueError as error:
        if given or _NEGATIVES not in str(error):
            raise
        return Config(model, dataset, files, {**settings, _NEGATIVES: None})


def _is_given(key: str, files: list[str] | None, settings: dict[str, Any]) -> bool:
    texts = [*sys.argv[1:], *(Path(file).read_text(encoding="utf-8") for file in files or [])]
    return key in settings or any(key in text for text in texts)


def _as_text(value: Any) -> Any:
    """A path as text: the Config is saved in checkpoints, which should not contain path objects."""
    if isinstance(value, (list, tuple)):
        return [_as_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def teacher_config(name: str, student: Any) -> Any:
    """The Config of a teacher that the command trains.

    Data, evaluation and environment are the student's. The keys of the model and of the training
    are the teacher's own: RecBole's defaults, then ``teacher_config_files``, then keys with the
    prefix ``teacher_``.

    Args:
        name: the teacher's model, a RecBole model name.
        student: the Config of the command.

    Raises:
        SettingsError: a ``teacher_`` key does not exist for this model or has no effect; or the
            teacher would need another split or evaluation than the student.
    """
    shared_keys = {*general_arguments, *evaluation_arguments, *dataset_arguments}
    # Only the student's data loaders are saved.
    shared_keys -= {"save_dataloaders", "dataloaders_save_path"}
    shared = {
        k: v for k, v in student.external_config_dict.items() if k in shared_keys and k != "dataset"
    }
    # RecBole's default metrics of context-aware models are not those of a ranking. Its default
    # split of sequential models differs from that of others, but teacher and student share one.
    shared |= {key: student[key] for key in ("metrics", "topk", "valid_metric")}
    shared["eval_args"] = {**student["eval_args"], "mode": dict(student["eval_args"]["mode"])}
    own = {
        key.removeprefix("teacher_"): value
        for key, value in plain(student).items()
        if key.startswith("teacher_") and key not in RUN_KEYS
    }
    for key in ("model", "dataset"):
        if key in own:
            raise SettingsError(
                f"[teacher_{key}] has no effect: [teacher] names the model, and its data are the "
                "student's."
            )
    if "seed" in own:
        raise SettingsError(
            "[teacher_seed] has no effect: the seed is part of the split, which the student "
            "decides."
        )
    if not student["single_spec"]:
        # The same processes train the teacher.
        own |= {
            key: student[key]
            for key in (*PLACE_KEYS, "world_size", "local_rank")
            if key in plain(student)
        }
    files = student["teacher_config_files"] or []
    files = files.split() if isinstance(files, str) else list(files)
    with _no_command_line():
        try:
            config = _recboles_config(
                name, student["dataset"], files, {**shared, **own}, _NEGATIVES in own
            )
        except ValueError as error:
            raise SettingsError(
                f"RecBole cannot read the settings of the teacher {name}: {error}"
            ) from error
    known = known_to_recbole(config) - {"config_files"}
    for key in own:
        if key not in known:
            raise SettingsError(
                f"[teacher_{key}]: {name} has no setting [{key}]. {nearest(key, known)}"
            )
    config["seed"] = student["seed"]  # the split depends on it
    columns = (config["load_col"] or {}).get("inter", "*")
    labelled = config["threshold"] or columns == "*" or config["LABEL_FIELD"] in columns
    if (
        config["eval_type"] == EvaluatorType.VALUE
        and config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE
        and not labelled
    ):
        raise SettingsError(
            f"[teacher] {name} is validated as the student is, on labels, but learns from pairs, "
            "which have none: say with threshold: {rating: 4} what a label is, or rank all "
            "items, with eval_args: {mode: full}, [metrics] and [valid_metric]."
        )
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and config["eval_args"]["order"] != "TO":
        raise SettingsError(
            f"[teacher] {name} learns sequences, but [eval_args] has order "
            f"{config['eval_args']['order']!r}, so that the test items lie within them: set order: "
            "TO."
        )
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        as_student = student["MODEL_TYPE"] == ModelType.SEQUENTIAL
        config["kd_sequence_split"] = student["kd_sequence_split"] if as_student else "interactions"
    return config


def assistant_config(student: Any, settings: RunSettings, teacher: Any) -> Any:
    """The Config of the assistant between teacher and students (TARec).

    It is the students' Config with another ``embedding_size``: ``tarec_assistant_size``, or for −1
    the geometric mean of the teacher's and the student's, rounded. With a sum of methods
    (``rce+tarec``), the assistant learns by the same sum.

    Args:
        student: the Config of the method's runs, with the KD settings in it.
        settings: the settings of these runs.
        teacher: the teacher's Config, or ``None`` for a teacher without one.

    Returns:
        The Config, or ``None`` if the method has no assistant.

    Raises:
        SettingsError: the student's model has no ``embedding_size``; or the mean is wanted, but the
            teacher has no ``embedding_size``; or the method needs earlier states of its teacher.
    """
    wanted = student["tarec_assistant_size"] if "tarec" in settings.method.losses else 0
    if wanted == 0:
        return None
    if _width(student) is None:
        raise SettingsError(
            f"[tarec_assistant_size] is {wanted}, but {student['model']} has no [embedding_size] "
            "for its assistant to differ in: set tarec_assistant_size: 0 to learn from the teacher "
            "itself."
        )
    if settings.method.needs_earlier_states:
        raise SettingsError(
            f"[kd_loss] {student['kd_loss']} learns from earlier states of its teacher, of which "
            "an assistant keeps none: set tarec_assistant_size: 0."
        )
    if wanted == -1:
        if _width(teacher) is None:
            raise SettingsError(
                "[tarec_assistant_size] is -1, the geometric mean of two [embedding_size]s, but "
                "the teacher has none: give the assistant's own size, or 0 for no assistant."
            )
        wanted = round(math.sqrt(_width(student) * _width(teacher)))
    config = copy.deepcopy(student)
    config["embedding_size"] = wanted
    config["tarec_assistant_size"] = 0
    return config


def _width(config: Any) -> Any:
    """The ``embedding_size`` of a model; ``None`` if the model does not have this setting."""
    return (
        None
        if config is None or "embedding_size" not in config.internal_config_dict
        else config["embedding_size"]
    )


@contextmanager
def _no_command_line() -> Iterator[None]:
    """While this lasts, RecBole's Config finds no keys on the command line.

    Each Config reads ``sys.argv``, but the student's ``--embedding_size`` is not the teacher's.
    """
    with _command_line(sys.argv[:1]):
        yield


@contextmanager
def _without_on_the_command_line(keys: Iterable[str]) -> Iterator[None]:
    """While this lasts, RecBole's Config does not find these keys on the command line."""
    ours = tuple(f"--{key}=" for key in keys)
    with _command_line([word for word in sys.argv if not word.startswith(ours or "\0")]):
        yield


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    argv, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = argv
