"""The methods that ``kd_loss`` names; each is one loss or a sum of losses.

A loss has a name (``rce``), or is a class in a module of yours (``my_module:MyLoss``).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import nearest
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.losses.base import KDLoss, Loss

# The name of the student alone, without distillation: RecBole's own run.
SCRATCH = "scratch"


@dataclass(frozen=True)
class Method:
    """One method of ``kd_loss``.

    Args:
        name: as it was given: ``rce``, ``rce+freqd``, ``my_module:MyLoss`` or ``scratch``.
        losses: the losses that it sums, by name; empty for ``scratch``.
    """

    name: str
    losses: Mapping[str, type[Loss]]

    @property
    def alone(self) -> bool:
        """Whether this is the student alone, without distillation."""
        return not self.losses

    @property
    def needs_teacher(self) -> bool:
        """Whether one of its losses needs a teacher."""
        return any(loss.needs_teacher for loss in self.losses.values())

    @property
    def needs_earlier_states(self) -> bool:
        """Whether one of its losses needs earlier checkpoints of the teacher."""
        return any(issubclass(ls, KDLoss) and ls.uses_trajectory for ls in self.losses.values())

    @property
    def prefixes(self) -> list[str]:
        """The prefixes of its losses' keys, in the order of the losses."""
        return [loss.prefix() for loss in self.losses.values()] or [SCRATCH]

    @property
    def file_name(self) -> str:
        """The name in a form that can be part of a file name."""
        return self.name.replace(":", ".")


def read_methods(value: Any) -> list[Method]:
    """The methods in ``kd_loss``: ``"scratch,rce,rce+freqd"``, a list, or one name.

    Args:
        value: the value of ``kd_loss``.

    Raises:
        SettingsError: a name is unknown or occurs twice.

    Example:
        >>> [method.name for method in read_methods("scratch, rce + freqd")]
        ['scratch', 'rce+freqd']
    """
    given = value.split(",") if isinstance(value, str) else value
    given = given if isinstance(given, (list, tuple)) else [given]
    methods = [_read_method(str(name), value) for name in given]
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise SettingsError(
            f"[kd_loss] is {value!r}, but must name each method once, as in scratch,rce."
        )
    return methods


def read_method(value: Any) -> Method:
    """The one method in ``kd_loss``, for a single training.

    Raises:
        SettingsError: there are several, or it is ``scratch``, or it is unknown.
    """
    methods = read_methods(value)
    if len(methods) != 1 or methods[0].alone:
        raise SettingsError(f"One trainer distils with one method, but [kd_loss] is {value!r}.")
    return methods[0]


def _read_method(text: str, value: Any) -> Method:
    parts = [part.strip() for part in text.split("+")]
    name = "+".join(parts)
    if name == SCRATCH:
        return Method(name, {})
    losses = {part: find_loss(part) for part in parts}
    if len(losses) < len(parts):
        raise SettingsError(
            f"[kd_loss] is {value!r}, but a sum names each of its methods once: rce+freqd."
        )
    prefixes = [loss.prefix() for loss in losses.values()]
    if len(set(prefixes)) < len(prefixes):
        raise SettingsError(
            f"[kd_loss] is {value!r}, but two of its losses have settings with the same prefix, "
            f"{', '.join(prefixes)}: give your own loss another one."
        )
    return Method(name, losses)


def find_loss(name: str) -> type[Loss]:
    """The loss class with this name.

    Args:
        name: one of ``LOSSES``, or ``module:Class`` for a class of yours, whose module must be
            importable.

    Raises:
        SettingsError: there is none. The message says which names exist, or what is wrong with the
            module or the class.
    """
    if ":" in name:
        return _own_loss(name)
    if name == SCRATCH:
        raise SettingsError(
            "[kd_loss] sums scratch with something, but it stands alone, for the student alone: "
            "scratch,rce."
        )
    if name not in LOSSES:
        raise SettingsError(
            f"[kd_loss] names {name!r}, which is not a loss. {nearest(name, [*LOSSES, SCRATCH])} "
            "A loss of your own is named module:Class."
        )
    return LOSSES[name]


def _own_loss(name: str) -> type[Loss]:
    where, _, what = name.partition(":")
    try:
        module = importlib.import_module(where)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name not in _parents(where):
            raise  # the module exists, but imports one that does not
        raise SettingsError(
            f"[kd_loss] names {name!r}, but there is no module {where!r}: run the command in its "
            "folder, or put the folder on PYTHONPATH."
        ) from error
    found = getattr(module, what, None)
    if not (isinstance(found, type) and issubclass(found, Loss)):
        raise SettingsError(
            f"[kd_loss] names {name!r}, but {what or 'nothing'!r} in [{module.__file__}] is no "
            "subclass of recbole_rcekd.losses.KDLoss or EmbeddingLoss."
        )
    known = LOSSES.get(found.prefix())
    if found.prefix() == SCRATCH or (known is not None and not issubclass(found, known)):
        raise SettingsError(
            f"[kd_loss] {name}: its settings have the prefix {found.prefix()!r}, which belongs to "
            "a loss of this package: give yours another one."
        )
    return found


def _parents(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[: n + 1]) for n in range(len(parts))}


def prefix_of(key: str, more: Iterable[str] = ()) -> str | None:
    """The prefix of a loss that a key begins with.

    Of ``dcd_port_items`` it is ``dcd_port``, not ``dcd``.

    Args:
        key: a key of a Config.
        more: prefixes of losses of your own.
    """
    names = [name for name in (*LOSSES, SCRATCH, *more) if key.startswith(f"{name}_")]
    return max(names, key=len) if names else None
