"""How RecBole's own code is changed where it runs: some text of a method, or a function around it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

# Set on what we put in place of a library's own function, so that a second `apply` leaves it alone.
MARK = "__recbole_rcekd__"
# On what we put around one, which may have been rewritten before.
_WRAPPED = "__recbole_rcekd_wrapped__"


def rewrite(
    owner: Any, method: str, edits: Mapping[str, str], names: Mapping[str, Any] | None = None
) -> None:
    """Recompile one method of RecBole with some of its text replaced, at its own line numbers.

    Narrower than a method of our own: every other line stays RecBole's, and so do tracebacks.

    Args:
        owner: The class that defines the method itself, or the module that defines a function.
        method: The method's name. It must not use `super()` without arguments.
        edits: Old text -> new text of as many lines.
        names: What the new text refers to, if it is nothing that the method's module knows.

    Raises:
        RuntimeError: If an old text is not there. Going on would bring a silent fault back.
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
    # dont_inherit: this file's __future__ imports are not RecBole's.
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
    """Put a function around one of RecBole's, once."""
    original = vars(owner)[name]
    if hasattr(original, _WRAPPED):
        return
    replacement = wrap(original)
    setattr(replacement, _WRAPPED, True)
    setattr(owner, name, replacement)
