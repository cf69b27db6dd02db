"""The KD settings in RecBole's Config, checked strictly and read once.

RecBole reads a missing key as ``None`` and accepts every unknown key. So with a misspelt key it
would train with the default. Keys with the prefixes of this package are therefore checked here,
before anything is computed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recbole
from recbole.utils.argument_list import (
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_rcekd.core.distributed import PLACE_KEYS
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import (
    KDSettings,
    LossSettings,
    TeacherSettings,
    nearest,
    read_settings,
)
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.losses.base import KDLoss, Loss
from recbole_rcekd.losses.methods import SCRATCH, Method, prefix_of, read_method, read_methods

# Keys of a whole command, not of one loss.
RUN_KEYS = frozenset(
    {
        *("kd_loss", "teacher", "teacher_config_files", "teacher_trust", "seeds", "output_dir"),
        *TeacherSettings.keys(),
    }
)
# Keys of the command line only.
COMMAND_KEYS = frozenset(
    {
        *("config_files", "tune", "trials", "params_file", "algo"),
        *("analyse", "student", "baseline", "history", "analyse_users"),
    }
)
# RecBole's training keys that may differ between the methods of one command: `rce_weight_decay`,
# `scratch_epochs`.
PER_LOSS_KEYS = frozenset(
    {"learning_rate", "weight_decay", "learner", "epochs", "eval_step", "stopping_step"}
)


@dataclass(frozen=True)
class RunSettings:
    """The KD settings of one training run.

    Args:
        method: the method, one loss or a sum of losses.
        common: the settings that are common to all losses.
        losses: the settings of each loss, by its name.
    """

    method: Method
    common: KDSettings
    losses: Mapping[str, LossSettings]

    @classmethod
    def read(cls, config: Any) -> RunSettings:
        """Read the settings from a Config, which has RecBole's own precedence of sources.

        Args:
            config: RecBole's Config (or any mapping). ``kd_loss`` names one method, by default
                ``rce``.

        Raises:
            SettingsError: a key is unknown (the message names the nearest known one), or a value
                has a wrong type or is out of range.
        """
        check_keys(config)
        given = plain(config)
        method = read_method(given.get("kd_loss") or "rce")
        losses = {
            name: read_settings(loss.settings_type, f"loss/{name}" if name in LOSSES else "", given)
            for name, loss in method.losses.items()
        }
        common = read_settings(KDSettings, "kd", given)
        settings = cls(method, common, losses)
        if common.kd_base_weight == 0.0 and all(
            loss.weight == 0.0 for loss in settings.build_losses().values()
        ):
            raise SettingsError(
                f"[kd_base_weight] and [{method.prefixes[0]}_weight] are both 0, so there is "
                "nothing to learn from: raise one of them."
            )
        return settings

    def build_losses(self) -> dict[str, Loss]:
        """New losses, by name; the parameters that they learn belong to one training run."""
        return {name: loss(self.losses[name]) for name, loss in self.method.losses.items()}

    def losses_of_earlier_states(self) -> list[KDLoss]:
        """The losses that learn from earlier states of the teacher."""
        losses = self.build_losses().values() if self.method.needs_earlier_states else ()
        return [loss for loss in losses if isinstance(loss, KDLoss) and loss.uses_trajectory]

    def as_dict(self) -> dict[str, Any]:
        """All KD keys and their values."""
        found = self.common.as_dict()
        for settings in self.losses.values():
            found |= settings.as_dict()
        return found


@dataclass(frozen=True)
class Run:
    """The Config and the settings with which the students of one method are trained.

    Args:
        method: the method that ``kd_loss`` names.
        config: RecBole's Config. The KD settings are written into it, so that log, tensorboard and
            checkpoint show them.
        settings: the KD settings; ``None`` for the student alone.
    """

    method: Method
    config: Any
    settings: RunSettings | None

    @property
    def name(self) -> str:
        """The name of the method, as in ``kd_loss``."""
        return self.method.name

    def build_losses(self) -> dict[str, Loss]:
        """New losses, by name; none for the student alone."""
        return {} if self.settings is None else self.settings.build_losses()

    def losses_of_earlier_states(self) -> list[KDLoss]:
        """The losses that learn from earlier states of the teacher."""
        return [] if self.settings is None else self.settings.losses_of_earlier_states()


def read_trust(config: Any) -> bool:
    """The key ``teacher_trust``, which lets a checkpoint run any code.

    Args:
        config: RecBole's Config.

    Raises:
        SettingsError: it is neither True nor False. (``no``, for example, is a text, which would
            count as true.)
    """
    value = config["teacher_trust"]
    if value is not None and not isinstance(value, bool):
        raise SettingsError(f"[teacher_trust] is {value!r}, but must be True or False.")
    return bool(value)


def check_keys(config: Any) -> None:
    """Refuse unknown keys that are probably misspelt KD keys.

    Args:
        config: RecBole's Config, or any mapping.

    Raises:
        SettingsError: a key is unknown; the message names it and the nearest known one.
    """
    given = plain(config)
    ours = set(KDSettings.keys()) | RUN_KEYS
    losses = {**LOSSES, **_own_losses(given)}
    retired: dict[str, Any] = {}
    prefixes = {"kd": set(KDSettings.keys()) | {"kd_loss"}}
    for loss in losses.values():
        keys = {f"{loss.prefix()}_{key}" for key in PER_LOSS_KEYS}
        prefixes[loss.prefix()] = set(loss.settings_type.keys()) | keys
        ours |= prefixes[loss.prefix()]
        retired |= loss.settings_type.retired
    prefixes[SCRATCH] = {f"{SCRATCH}_{key}" for key in PER_LOSS_KEYS}
    known = known_to_recbole(config)
    elsewhere = known | COMMAND_KEYS
    for key in given:
        prefix = "kd" if key.startswith("kd_") else prefix_of(key, prefixes)
        if prefix is not None:
            if key in retired and given[key] == retired[key]:
                continue
            if key in retired:
                suffix = key.removeprefix(f"{prefix}_")
                now = [name for name in ours if name.endswith(f"_{suffix}") and name != key]
                raise SettingsError(
                    f"[{key}] is no setting of {prefix} any more; {' or '.join(sorted(now))} is."
                )
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


def _own_losses(given: Mapping[str, Any]) -> dict[str, type[Loss]]:
    """The losses in ``kd_loss`` that are the user's own classes."""
    methods = read_methods(given["kd_loss"]) if given.get("kd_loss") else []
    return {name: loss for method in methods for name, loss in method.losses.items() if ":" in name}


def overrides_for(method: Method, config: Any) -> dict[str, Any]:
    """The RecBole keys that the user has set for one method.

    ``rce_weight_decay: 1e-5`` gives ``{"weight_decay": 1e-5}``. In a sum of losses, the first loss
    for which a key is set decides.

    Args:
        method: the method.
        config: RecBole's Config, or any mapping.
    """
    given = plain(config)
    return {
        key: given[f"{prefix}_{key}"]
        for prefix in reversed(method.prefixes)
        for key in sorted(PER_LOSS_KEYS)
        if f"{prefix}_{key}" in given
    }


def plain(config: Any) -> Mapping[str, Any]:
    """The keys and values of a Config; a mapping is returned as it is."""
    values: Mapping[str, Any] = getattr(config, "final_config_dict", config)
    return values


def _keys_of_all_models() -> set[str]:
    """The keys of all RecBole models.

    A property file for several models has keys that are unknown to the model of this Config. They
    are no misspelt keys.
    """
    files = (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml")
    return {
        key
        for file in files
        for key in re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def known_to_recbole(config: Any) -> set[str]:
    """The keys that RecBole reads for the model of this Config; empty for a mapping."""
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
