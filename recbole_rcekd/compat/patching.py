"""Changing RecBole's code at run time: the text of a method, or a function around it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

# Set on a function that replaces one of a library, so that a second `apply` leaves it alone.
MARK = "__recbole_rcekd__"
# Set on a function around another one, which may be a replacement itself.
_WRAPPED = "__recbole_rcekd_wrapped__"


def rewrite(
    owner: Any, method: str, edits: Mapping[str, str], names: Mapping[str, Any] | None = None
) -> None:
    """Recompile one method of RecBole with some of its text replaced, with the same line numbers.

    So every other line stays RecBole's, and tracebacks stay correct.

    Args:
        owner: The class that defines the method itself, or the module that defines a function.
        method: The method's name. It must not use `super()` without arguments.
        edits: Old text -> new text with the same number of lines.
        names: Names in the new text that the method's module does not define.

    Raises:
        RuntimeError: If an old text is missing: the fault would come back without an error.
    """
    function = vars(owner)[method]
    if hasattr(function, MARK):
        return
    lines, first_line = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    for old, new in edits.items():
        if old not in source:
            raise RuntimeError(
                f"{function.__module__}.{function.__qualname__} has no line {old!r}: this is not "
                "the RecBole that recbole_rcekd was written for. Install recbole==1.2.1."
            )
        source = source.replace(old, new)
    function.__globals__.update(names or {})
    # dont_inherit: RecBole's code does not have the __future__ imports of this file.
    code = compile(
        "\n" * (first_line - 1) + source, function.__code__.co_filename, "exec", dont_inherit=True
    )
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    replacement = namespace[method]
    replacement.__qualname__ = function.__qualname__
    replacement.__module__ = function.__module__
    setattr(replacement, MARK, True)
    setattr(owner, method, replacement)


def wrap(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around one of RecBole's; the second time nothing happens."""
    original = vars(owner)[name]
    if hasattr(original, _WRAPPED):
        return
    replacement = wrap(original)
    setattr(replacement, _WRAPPED, True)
    setattr(owner, name, replacement)
