"""RecBole's Configs of commands, teachers and assistants, and the settings in them, of which ours are checked strictly.

RecBole reads a missing key as ``None`` and accepts every unknown one, so that a typing error means
"trained with the default". Keys with our prefixes are therefore checked by name here, before
anything is computed.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.config import Config
from recbole.utils import EvaluatorType, InputType, ModelType
from recbole.utils.argument_list import (
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_rcekd.core.distributed import PLACE_KEYS
from recbole_rcekd.core.errors import KDError, SettingsError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings, nearest, read_settings
from recbole_rcekd.losses import LOSSES, get_loss
from recbole_rcekd.losses.base import KDLoss, Loss

SCRATCH = "scratch"
# Keys of a whole command, not of one loss.
RUN_KEYS = frozenset(
    {
        *("kd_loss", "teacher", "teacher_config_files", "teacher_trust", "seeds", "output_dir"),
        *TeacherSettings.keys(),
    }
)
_NEGATIVES = "train_neg_sample_args"
# Of the command line alone.
COMMAND_KEYS = frozenset(
    {
        *("config_files", "tune", "params_file", "algo"),
        *("analyse", "student", "baseline", "history", "analyse_users"),
    }
)
# RecBole's training keys that may differ between the methods of one command: `rce_weight_decay`,
# `scratch_epochs`.
PER_LOSS_KEYS = frozenset(
    {"learning_rate", "weight_decay", "learner", "epochs", "eval_step", "stopping_step"}
)


def command_config(
    model: str | None,
    dataset: str | None,
    config_file_list: list[str] | None,
    config_dict: dict[str, Any] | None,
    given: dict[str, Any],
) -> Any:
    """RecBole's Config of a command.

    Args:
        model: as of :func:`run_recbole_kd`, and so on.
        dataset: likewise.
        config_file_list: likewise.
        config_dict: likewise.
        given: keys of ours that were given as arguments; ``None`` where not.

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
        return _recboles_config(model, dataset, config_file_list, settings, given_negatives)
    except KDError:
        raise
    except ModuleNotFoundError as error:
        # RecBole looks for a name that it does not know among the models that need these.
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
    """Sequential models learn from the whole catalogue by default, and RecBole wants to be told; ``given``: something else was."""
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
    """Paths as text: the Config goes into checkpoints, which hold no other objects."""
    if isinstance(value, (list, tuple)):
        return [_as_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def loss_names(value: Any) -> list[str]:
    """``kd_loss`` as a list of methods: ``"scratch,rce,rce+freqd"``, ``[scratch, rce]`` or one name.

    Raises:
        SettingsError: a name is unknown or stands there twice.
    """
    given = (
        value.split(",")
        if isinstance(value, str)
        else value
        if isinstance(value, (list, tuple))
        else [value]
    )
    names = ["+".join(part.strip() for part in str(name).split("+")) for name in given]
    for name in names:
        if name != SCRATCH:
            parts = parts_of(name)
            for part in parts:
                get_loss(part)
            if len(set(parts)) < len(parts):
                raise SettingsError(
                    f"[kd_loss] is {value!r}, but a sum names each of its methods once: rce+freqd."
                )
    if not names or len(set(names)) < len(names):
        raise SettingsError(
            f"[kd_loss] is {value!r}, but must name each method once, as in scratch,rce."
        )
    return names


def parts_of(name: str) -> list[str]:
    """The losses that a method sums: ``rce+freqd`` → ``[rce, freqd]``."""
    return name.split("+")


def read_kd_settings(config: Any) -> tuple[KDSettings, dict[str, Loss]]:
    """The settings of one distillation, from a Config with RecBole's own precedence.

    Args:
        config: RecBole's Config (or any mapping); ``kd_loss`` names one method, default ``rce``.

    Returns:
        What is common, and the method's losses by name.

    Raises:
        SettingsError: an unknown key (with the nearest known one), a wrong type, or a value out of
            range.
    """
    check_keys(config)
    given = _plain(config)
    names = loss_names(given.get("kd_loss") or "rce")
    if len(names) != 1 or names == [SCRATCH]:
        raise SettingsError(
            f"One trainer distils with one method, but [kd_loss] is {given.get('kd_loss')!r}."
        )
    losses: dict[str, Loss] = {}
    for name in parts_of(names[0]):
        loss_type = get_loss(name)
        losses[name] = loss_type(read_settings(loss_type.settings_type, f"loss/{name}", given))
    settings = read_settings(KDSettings, "kd", given)
    if settings.kd_base_weight == 0.0 and all(loss.weight == 0.0 for loss in losses.values()):
        raise SettingsError(
            f"[kd_base_weight] and [{names[0]}_weight] are both 0, so there is nothing to learn "
            "from: raise one of them."
        )
    return settings, losses


def needs_teacher(name: str) -> bool:
    """Whether a method of ``kd_loss`` learns from a teacher."""
    return name != SCRATCH and any(get_loss(part).needs_teacher for part in parts_of(name))


def trajectory_losses(config: Any) -> list[KDLoss]:
    """Those losses of a run's method that learn from earlier states of the teacher."""
    if config["kd_loss"] == SCRATCH:
        return []
    losses = read_kd_settings(config)[1].values()
    return [loss for loss in losses if isinstance(loss, KDLoss) and loss.uses_trajectory]


def read_trust(config: Any) -> bool:
    """``teacher_trust``, which lets a checkpoint run any code.

    Raises:
        SettingsError: it is neither True nor False. (``no`` is a text, and a text is true.)
    """
    value = config["teacher_trust"]
    if value is not None and not isinstance(value, bool):
        raise SettingsError(f"[teacher_trust] is {value!r}, but must be True or False.")
    return bool(value)


def owner(key: str) -> str | None:
    """The loss whose prefix a key carries: ``dcd_port_top_k`` → ``dcd_port``, though there is a ``dcd`` too."""
    names = [name for name in (*LOSSES, SCRATCH) if key.startswith(f"{name}_")]
    return max(names, key=len) if names else None


def check_keys(config: Any) -> None:
    """Refuse keys that look like ours and are not.

    Raises:
        SettingsError: names the key and the nearest known one.
    """
    ours = set(KDSettings.keys()) | RUN_KEYS
    prefixes = {"kd": set(KDSettings.keys()) | {"kd_loss"}}
    for name, loss_type in LOSSES.items():
        prefixes[name] = set(loss_type.settings_type.keys()) | {
            f"{name}_{key}" for key in PER_LOSS_KEYS
        }
        ours |= prefixes[name]
    prefixes[SCRATCH] = {f"{SCRATCH}_{key}" for key in PER_LOSS_KEYS}
    known = _known_to_recbole(config)
    elsewhere = known | COMMAND_KEYS
    for key in _plain(config):
        prefix = "kd" if key.startswith("kd_") else owner(key)
        if prefix is not None:
            if key not in prefixes[prefix] and key not in known:
                raise SettingsError(
                    f"[{key}] is not a setting of distillation. {nearest(key, prefixes[prefix])}"
                )
        elif known and key not in elsewhere | ours and not key.startswith("teacher_"):
            close = difflib.get_close_matches(key, elsewhere | ours, n=1, cutoff=0.8)
            if close and key not in _keys_of_all_models():
                raise SettingsError(
                    f"[{key}] is known neither to RecBole nor here. Did you mean [{close[0]}]?"
                )


def overrides_for(name: str, config: Any) -> dict[str, Any]:
    """RecBole keys that the user set for one method: ``rce_weight_decay: 1e-5`` → ``{"weight_decay": 1e-5}``.

    Of a sum, the first of its losses for which a key is set decides.
    """
    given = _plain(config)
    return {
        key: given[f"{part}_{key}"]
        for part in reversed(parts_of(name))
        for key in sorted(PER_LOSS_KEYS)
        if f"{part}_{key}" in given
    }


def teacher_config(name: str, student: Any) -> Any:
    """The Config of a teacher that is trained now.

    Data, evaluation and environment are the student's. The model's and the training's keys are the
    teacher's own: RecBole's defaults, then ``teacher_config_files``, then keys with the prefix
    ``teacher_``.

    Raises:
        SettingsError: a ``teacher_`` key does not exist for this model, or would give it another
            split.
    """
    shared_keys = {*general_arguments, *evaluation_arguments, *dataset_arguments}
    shared_keys -= {
        "save_dataloaders",
        "dataloaders_save_path",
    }  # the loaders that are kept are the student's
    shared = {
        k: v for k, v in student.external_config_dict.items() if k in shared_keys and k != "dataset"
    }
    # The default differs between sequential models and others, but the split is one.
    # What a context-aware model measures by default is no ranking.
    shared |= {key: student[key] for key in ("metrics", "topk", "valid_metric")}
    shared["eval_args"] = {**student["eval_args"], "mode": dict(student["eval_args"]["mode"])}
    own = {
        key.removeprefix("teacher_"): value
        for key, value in _plain(student).items()
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
        # The same processes train it.
        own |= {
            key: student[key]
            for key in (*PLACE_KEYS, "world_size", "local_rank")
            if key in _plain(student)
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
    known = _known_to_recbole(config) - {"config_files"}
    for key in own:
        if key not in known:
            raise SettingsError(
                f"[teacher_{key}]: {name} has no setting [{key}]. {nearest(key, known)}"
            )
    config["seed"] = student["seed"]  # the seed is part of the split
    columns = (config["load_col"] or {}).get("inter", "*")
    labelled = config["threshold"] or columns == "*" or config["LABEL_FIELD"] in columns
    if (
        config["eval_type"] == EvaluatorType.VALUE
        and config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE
        and not labelled
    ):
        raise SettingsError(
            f"[teacher] {name} is validated as the student is, on labels, but learns from pairs, "
            f"which have none: say with threshold: {{rating: 4}} what a label is, or rank all "
            f"items, with eval_args: {{mode: full}}, [metrics] and [valid_metric]."
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


def assistant_config(student: Any, teacher: Any) -> Any:
    """The Config of the assistant of a method's students (TARec), or ``None`` if there is none.

    It is the students' own but for ``embedding_size``, which is ``tarec_assistant_size``, or, for
    −1, the geometric mean of the teacher's and the student's, rounded. A sum (``rce+tarec``)
    teaches its assistant all of it.

    Args:
        student: the Config of the method's runs, with the KD settings in it.
        teacher: the teacher's, or ``None`` for one without.

    Raises:
        SettingsError: the student's model has no ``embedding_size``; or the teacher has none, for
            the mean; or the method needs earlier states of its teacher.
    """
    wanted = student["tarec_assistant_size"] if "tarec" in parts_of(student["kd_loss"]) else 0
    if wanted == 0:
        return None
    if _width(student) is None:
        raise SettingsError(
            f"[tarec_assistant_size] is {wanted}, but {student['model']} has no [embedding_size] "
            "for its assistant to differ in: set tarec_assistant_size: 0 to learn from the teacher "
            "itself."
        )
    if trajectory_losses(student):
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
    """``embedding_size`` of a model that has it among its defaults (others are given it in vain)."""
    return (
        None
        if config is None or "embedding_size" not in config.internal_config_dict
        else config["embedding_size"]
    )


@contextmanager
def _no_command_line() -> Iterator[None]:
    """RecBole's Config reads ``sys.argv`` each time: the student's ``--embedding_size`` must not reach the teacher."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = argv


def _plain(config: Any) -> Mapping[str, Any]:
    values: Mapping[str, Any] = getattr(config, "final_config_dict", config)
    return values


def _keys_of_all_models() -> set[str]:
    """Of every model of RecBole: one that stands in a file for several models is no mistyped one of ours."""
    files = (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml")
    return {
        key
        for file in files
        for key in re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def _known_to_recbole(config: Any) -> set[str]:
    internal = getattr(config, "internal_config_dict", None)
    if internal is None:
        return set()
    return {
        *internal,
        *general_arguments,
        *training_arguments,
        *evaluation_arguments,
        *dataset_arguments,
        *("model", "dataset", "config_files", "world_size", *PLACE_KEYS),
        *(
            "MODEL_INPUT_TYPE",
            "MODEL_TYPE",
            "eval_type",
            "single_spec",
            "local_rank",
            "device",
            "valid_metric_bigger",
        ),
        *("valid_neg_sample_args", "test_neg_sample_args"),
    }
