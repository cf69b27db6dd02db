"""Settings: RecBole's loose key–value Config, read once into frozen dataclasses that refuse what they do not know.

Each loss names its own keys with its own prefix (``rce_beta``); the keys common to all start with
``kd_``. The defaults that a run starts from are the yaml files in ``properties/``, which a RecBole
user can read and copy.
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
    """A dataclass field with a default and the range that is allowed (``low`` and ``high`` included)."""
    return field(default=default, metadata={"low": low, "above": above, "high": high})


def nearest(key: str, known: Iterable[str]) -> str:
    """`` Did you mean [x]?``, or the list of what exists when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"Did you mean [{close[0]}]?" if close else f"Known: {', '.join(known)}."


@dataclass(frozen=True)
class Settings:
    """Base of all settings: checks types and ranges when it is built, so that no run starts with a bad one.

    Raises:
        SettingsError: a value has the wrong type, is out of range, or does not fit another one.
    """

    def __post_init__(self) -> None:
        """Check every field, then the relations between fields."""
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
        if typing.get_origin(hint) is typing.Union:  # a number, or one of a few words
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
        if isinstance(value, str):  # a word in the place of a number
            return
        for kind, fits, words in (
            ("low", operator.ge, "at least"),
            ("above", operator.gt, "above"),
            ("high", operator.le, "at most"),
        ):
            bound = meta.get(kind)
            # Written so that NaN fails too.
            if bound is not None and not fits(value, bound):
                raise SettingsError(f"[{spec.name}] is {value!r}, but must be {words} {bound}.")

    @classmethod
    def keys(cls) -> list[str]:
        """The names of the settings, in their order."""
        return [spec.name for spec in dataclasses.fields(cls)]

    @classmethod
    def from_mapping(cls: type[S], values: Mapping[str, Any]) -> S:
        """Build from a mapping that holds nothing but settings of this class.

        Raises:
            SettingsError: a key is unknown (the nearest known one is named), or a value does not
                fit.
        """
        known = cls.keys()
        for key in values:
            if key not in known:
                raise SettingsError(
                    f"[{key}] is not a setting of {cls.__name__}. {nearest(key, known)}"
                )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain key–value pairs, as they stand in a yaml file."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class KDSettings(Settings):
    """What is common to all losses; ``properties/kd.yaml`` documents each line.

    Attributes:
        kd_base_weight: of the model's own loss; 0 learns from the teacher alone.
        kd_schedule: ``users`` visits every user once per epoch (mean over users, as in the paper);
            ``interactions`` visits the users of each batch's rows, once per row (as the authors'
            code).
        kd_refresh_epochs: every user's lists are renewed once in so many epochs, a rotating share
            each epoch.
        kd_teacher_scores: ``standardised`` brings each context's teacher scores to mean 0 and
            deviation 1 over the catalogue.
        kd_teacher_temperature: teacher scores are divided by it (the losses' own temperatures
            divide both sides).
        kd_cache_dir: folder of the teacher-score cache.
        kd_cache_dtype: precision of cached scores of teachers that are not a product of two tables.
        kd_diagnostic_users: so many users are looked at in full every epoch for the closure gap; 0
            turns it off.
        kd_sequence_split: what a sequential model's split divides: ``rows``, a prefix of a sequence
            and its next item each, as RecBole; ``interactions``, as a general model's split does,
            so that the two kinds learn from the same.
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
    """What a training here keeps, teachers from outside RecBole, and several at once; ``properties/teacher.yaml`` documents each.

    Attributes:
        teacher_checkpoints: so many earlier states of a teacher that is trained here are kept
            beside it.
        teacher_weights: of each teacher, in their order; empty: all count the same.
        teacher_ensemble: ``standardised`` averages scores that were brought to mean 0 and deviation
            1 for each user; ``reciprocal_rank`` sums 1 / (60 + rank).
        teacher_floor: an item that a score file does not list lies so many deviations of the user's
            scores below the lowest listed one.
        teacher_unknown: what happens to rows of a score file whose user or item the student's data
            does not have.
        teacher_missing_users: what happens to training users of whom a score file says nothing.
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
            SettingsError: there are not as many weights as teachers.
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
        prefix: with what all keys begin. One of them is ``<prefix>_weight``, the λ of
            ``base + λ · KD``.

    Raises:
        SettingsError: a key has another prefix, or there is no weight.
    """

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the names of the keys, then as ever."""
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
        """The keys whose sum is how many items the catalogue must have; override where lists are cut to a length."""
        return ()

    def check_catalogue(self, n_items: int) -> None:
        """Refuse lists that are longer than the catalogue (``n_items`` without the padding item).

        Raises:
            SettingsError: the lists do not fit.
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
    """The defaults in ``properties/<name>.yaml``, as shipped (or as the user edited them in a clone)."""
    text = (
        resources.files("recbole_rcekd.properties")
        .joinpath(f"{name}.yaml")
        .read_text(encoding="utf-8")
    )
    loaded: dict[str, Any] = yaml.safe_load(text) or {}
    return loaded


def read_settings(cls: type[S], yaml_name: str, given: Mapping[str, Any]) -> S:
    """The shipped yaml, overlaid by the keys that the user gave (file, dict or command line).

    Args:
        cls: the settings.
        yaml_name: of the shipped yaml; empty: the defaults of the class.
        given: all that the user gave.
    """
    values = shipped_defaults(yaml_name) if yaml_name else {}
    values.update({key: given[key] for key in cls.keys() if key in given})
    return cls.from_mapping(values)
