"""The commands: ``run_recbole_kd.py VERB --key=value …``; ``distil`` is the default.

A verb is one small module here, with its own options and ``--help``, and one line in
:data:`VERBS`. Nothing is computed here.
"""

from __future__ import annotations

import os
import sys

from recbole_rcekd.cli import analyse, distil, tune
from recbole_rcekd.cli.options import PROGRAM, Verb
from recbole_rcekd.core.errors import KDError

VERBS: dict[str, Verb] = {"distil": distil.VERB, "tune": tune.VERB, "analyse": analyse.VERB}

__all__ = ["VERBS", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: default: those of the command line.

    Returns:
        The exit status: 0; 2 for a mistake of the user, told in one line; 130 if it was stopped.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, words = _verb(words)
    if name not in VERBS:
        print(
            f"error: {name} is no command of {PROGRAM}; there are {', '.join(VERBS)}. A key is "
            "written as --key=value.",
            file=sys.stderr,
        )
        return 2
    verb = VERBS[name]
    options, others = verb.read(words)
    # RecBole's Config looks on the command line for all other keys; of an analysis for nothing
    # else.
    argv, sys.argv = sys.argv, [sys.argv[0], *(words if verb.trains else others)]
    # Where a loss of your own may lie; last, so that it hides no module.
    sys.path.append(os.getcwd())
    try:
        verb.run(options)
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped. {verb.when_stopped(options)}".strip(), file=sys.stderr)
        return 130
    finally:
        sys.argv = argv
        sys.path.pop()
    return 0


def _verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb, and what follows it. ``--tune=4`` and ``--analyse`` were options once."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if "--analyse" in words:
        return "analyse", [word for word in words if word != "--analyse"]
    for place, word in enumerate(words):
        if word == "--tune":
            return "tune", [*words[:place], "--trials", *words[place + 1 :]]
        if word.startswith("--tune="):
            return "tune", [*words[:place], f"--trials={word[7:]}", *words[place + 1 :]]
    return "distil", words
