"""Settings: keys of RecBole's Config, read once into frozen dataclasses that check them.

The keys of a loss start with the prefix of the loss (``rce_beta``), those common to all losses with
``kd_``. The defaults are in the yaml files in ``properties/``, which a RecBole user can read and
copy.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, ClassVar, TypeVar

import yaml

from recbole_rcekd.core.errors import SettingsError

S = TypeVar("S", bound="Settings")


def setting(
    default: Any, *, low: float | None = None, above: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field with a default and a range of allowed values.

    Args:
        default: the default.
        low: the least allowed value.
        above: allowed values are greater than this.
        high: the greatest allowed value.
    """
    return field(default=default, metadata={"low": low, "above": above, "high": high})


def nearest(key: str, known: Iterable[str]) -> str:
    """``Did you mean [x]?``, or a list of all known keys if none is similar."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"Did you mean [{close[0]}]?" if close else f"Known: {', '.join(known)}."


@dataclass(frozen=True)
class Settings:
    """Base of all settings, which checks types and ranges when it is built.

    Raises:
        SettingsError: a value has the wrong type, is out of range, or contradicts another one.
    """

    def __post_init__(self) -> None:
        """Check every field, then the fields against each other."""
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            self._check_type(spec.name, hints[spec.name])
            self._check_range(spec)
        self.check_relations()

    def check_relations(self) -> None:
        """Override to check fields against each other."""

    def _check_type(self, name: str, hint: Any) -> None:
        value = getattr(self, name)
        if typing.get_origin(hint) is typing.Literal:
            allowed = typing.get_args(hint)
            if value not in allowed:
                raise SettingsError(
                    f"[{name}] is {value!r}, but must be one of {', '.join(map(str, allowed))}. "
                    f"{nearest(str(value), map(str, allowed))}"
                )
            return
        kind = getattr(hint, "__name__", "")
        if typing.get_origin(hint) is typing.Union:  # a number or one of a few words
            hint, words = typing.get_args(hint)
            if value in typing.get_args(words):
                return
            kind = f"{hint.__name__}, or {' or '.join(typing.get_args(words))}"
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(self, name, float(value))
        elif not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
            raise SettingsError(
                f"[{name}] is {value!r} ({type(value).__name__}), but must be of type {kind}; "
                f"write it as {name}: {type(self).__dataclass_fields__[name].default!r}, for "
                "example."
            )

    def _check_range(self, spec: dataclasses.Field[Any]) -> None:
        value, meta = getattr(self, spec.name), spec.metadata
        if isinstance(value, str):  # a word instead of a number
            return
        for kind, fits, words in (
            ("low", operator.ge, "at least"),
            ("above", operator.gt, "above"),
            ("high", operator.le, "at most"),
        ):
            bound = meta.get(kind)
            # In this form NaN fails too.
            if bound is not None and not fits(value, bound):
                raise SettingsError(f"[{spec.name}] is {value!r}, but must be {words} {bound}.")

    @classmethod
    def keys(cls) -> list[str]:
        """The names of the settings, in the order of the fields."""
        return [spec.name for spec in dataclasses.fields(cls)]

    @classmethod
    def from_mapping(cls: type[S], values: Mapping[str, Any]) -> S:
        """Build from a mapping that has only keys of this class.

        Raises:
            SettingsError: a key is unknown (the message names a similar one), or a value is
                refused.
        """
        known = cls.keys()
        for key in values:
            if key not in known:
                raise SettingsError(
                    f"[{key}] is not a setting of {cls.__name__}. {nearest(key, known)}"
                )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The settings as a dict, as in a yaml file."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class KDSettings(Settings):
    """The settings common to all losses; ``properties/kd.yaml`` documents each line.

    Attributes:
        kd_base_weight: the weight of the model's own loss; with 0 the student learns from the
            teacher alone.
        kd_schedule: ``users`` visits every user once per epoch (mean over users, as in the paper);
            ``interactions`` visits the users of each batch's rows, once per row (as in the authors'
            code).
        kd_refresh_epochs: every user's candidates are renewed once in so many epochs, an equal
            share of the users in each epoch.
        kd_teacher_scores: ``standardised`` brings each user's teacher scores to mean 0 and standard
            deviation 1 over the catalogue; ``raw`` leaves them as they are.
        kd_teacher_temperature: teacher scores are divided by it. (The temperature of a loss divides
            the scores of both teacher and student.)
        kd_cache_dir: the folder of cached teacher scores.
        kd_cache_dtype: the precision of cached scores, for teachers whose scores are not a product
            of two tables.
        kd_diagnostic_users: the closure gap is measured on so many users every epoch; 0 turns it
            off.
        kd_sequence_split: what the split of a sequential model's data divides. ``rows``: the rows,
            each a prefix of a sequence and its next item, as in RecBole. ``interactions``: the
            interactions, as for a general model, so that both kinds learn from the same data.
    """

    kd_base_weight: float = setting(1.0, low=0.0)
    kd_schedule: typing.Literal["users", "interactions"] = "users"
    kd_refresh_epochs: int = setting(8, low=1)
    kd_teacher_scores: typing.Literal["raw", "standardised"] = "raw"
    kd_teacher_temperature: float = setting(1.0, above=0.0)
    kd_cache_dir: str = "saved/teacher_scores"
    kd_cache_dtype: typing.Literal["float16", "float32"] = "float32"
    kd_diagnostic_users: int = setting(8, low=0)
    kd_sequence_split: typing.Literal["rows", "interactions"] = "rows"


@dataclass(frozen=True)
class TeacherSettings(Settings):
    """Settings of teachers: earlier checkpoints, score files, and several teachers at once.

    ``properties/teacher.yaml`` documents each line.

    Attributes:
        teacher_checkpoints: how many earlier checkpoints of a teacher are kept if it is trained
            here.
        teacher_weights: one weight for each teacher, in their order; empty: all count the same.
        teacher_ensemble: ``standardised`` averages scores that were brought to mean 0 and standard
            deviation 1 for each user; ``reciprocal_rank`` sums 1 / (60 + rank).
        teacher_floor: an item that a score file does not list gets the user's lowest listed score
            less so many standard deviations of the user's scores.
        teacher_unknown: what to do with rows of a score file whose user or item the student's data
            does not have.
        teacher_missing_users: what to do if a score file has no rows of some training users.
    """

    teacher_checkpoints: int = setting(0, low=0)
    teacher_weights: list[float] = field(default_factory=list)
    teacher_ensemble: typing.Literal["standardised", "reciprocal_rank"] = "standardised"
    teacher_floor: float = setting(1.0, low=0.0)
    teacher_unknown: typing.Literal["error", "drop"] = "error"
    teacher_missing_users: typing.Literal["error", "skip"] = "error"

    def _check_type(self, name: str, hint: Any) -> None:
        if name != "teacher_weights":
            super()._check_type(name, hint)
            return
        given: Any = self.teacher_weights
        numbers = isinstance(given, list | tuple) and all(
            isinstance(weight, int | float)
            and not isinstance(weight, bool)
            and 0 <= weight < math.inf
            for weight in given
        )
        if not numbers or (len(given) and not any(given)):
            raise SettingsError(
                f"[teacher_weights] is {given!r}, but must be a list of numbers of at least 0, not "
                "all of them 0; write it as teacher_weights: [1, 1], for example, or leave it out "
                "to count all teachers the same."
            )
        object.__setattr__(self, "teacher_weights", [float(weight) for weight in given])

    def weights_of(self, teachers: Sequence[str]) -> list[float]:
        """The weight of each of ``teachers``.

        Raises:
            SettingsError: the number of weights is not the number of teachers.
        """
        if not self.teacher_weights:
            return [1.0] * len(teachers)
        if len(self.teacher_weights) != len(teachers):
            raise SettingsError(
                f"[teacher_weights] has {len(self.teacher_weights)} numbers, but there are "
                f"{len(teachers)} teachers: {', '.join(teachers)}. Give one weight for each, in "
                "this order."
            )
        return self.teacher_weights


@dataclass(frozen=True)
class LossSettings(Settings):
    """Base of a loss's settings.

    Attributes:
        prefix: all keys begin with it. One of them is ``<prefix>_weight``, the λ of
            ``base + λ · KD``.
        retired: keys that this loss had in earlier versions, with their defaults. An old file may
            still have them with these values, and old finished runs are still found.

    Raises:
        SettingsError: a key has another prefix, or there is no weight.
    """

    prefix: ClassVar[str] = ""
    retired: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        """Check the names of the keys, then the fields."""
        prefix = type(self).prefix
        stray = [key for key in self.keys() if not key.startswith(f"{prefix}_")]
        if not prefix or stray or f"{prefix}_weight" not in self.keys():
            raise SettingsError(
                f"{type(self).__name__} has the prefix {prefix!r} and the keys "
                f"{', '.join(self.keys())}, but every key must begin with the prefix, as in "
                "mine_top_k, and mine_weight be one of them."
            )
        super().__post_init__()

    def longest_list(self) -> tuple[str, ...]:
        """The keys whose sum is the number of items that the catalogue must have at least.

        Override it if the loss uses top-K lists of a fixed length.
        """
        return ()

    def check_catalogue(self, n_items: int) -> None:
        """Refuse top-K lists that are longer than the catalogue.

        Args:
            n_items: the number of items, without the padding item.

        Raises:
            SettingsError: the catalogue has too few items.
        """
        keys = self.longest_list()
        needed = sum(getattr(self, key) for key in keys)
        if needed > n_items:
            which = "it" if len(keys) == 1 else "the sum"
            raise SettingsError(
                f"{' + '.join(f'[{key}]={getattr(self, key)}' for key in keys)} needs a catalogue "
                f"of at least {needed} items, but this dataset has {n_items}. Lower {which} to "
                f"{n_items} or less."
            )


def shipped_defaults(name: str) -> dict[str, Any]:
    """The defaults in ``properties/<name>.yaml`` of the installed package (or of the clone)."""
    text = (
        resources.files("recbole_rcekd.properties")
        .joinpath(f"{name}.yaml")
        .read_text(encoding="utf-8")
    )
    loaded: dict[str, Any] = yaml.safe_load(text) or {}
    return loaded


def read_settings(cls: type[S], yaml_name: str, given: Mapping[str, Any]) -> S:
    """The defaults, replaced by what the user gave (in a file, a dict or on the command line).

    Args:
        cls: the class of settings to build.
        yaml_name: the name of the yaml file with the defaults; empty: the defaults of the class.
        given: all keys that the user gave.
    """
    values = shipped_defaults(yaml_name) if yaml_name else {}
    values.update({key: given[key] for key in cls.keys() if key in given})
    return cls.from_mapping(values)
