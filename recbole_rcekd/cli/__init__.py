"""The commands: ``run_recbole_kd.py VERB --key=value …``, where the default verb is ``distil``.

Each verb is one module of this package, with its own options and ``--help``, and one line in
:data:`VERBS`. Nothing is computed here.
"""

from __future__ import annotations

import os
import sys

from recbole_rcekd.cli import analyse, distil, tune
from recbole_rcekd.cli.options import Verb, program
from recbole_rcekd.core.errors import KDError
from recbole_rcekd.core.settings import nearest

VERBS: dict[str, Verb] = {"distil": distil.VERB, "tune": tune.VERB, "analyse": analyse.VERB}

__all__ = ["VERBS", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after the program's name; default: those of the command line.

    Returns:
        The exit status: 0; 2 after a mistake of the user, which is reported in one line; 130 if the
        command was stopped by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(_overview())
        return 0
    name, words = _verb(words)
    if name not in VERBS:
        print(
            f"error: {name} is no command of {program()}. {nearest(name, VERBS)} A key is written "
            "as --key=value.",
            file=sys.stderr,
        )
        return 2
    verb = VERBS[name]
    options, others = verb.read(words)
    # RecBole's Config reads `sys.argv`. With a training it finds all words there; with an analysis
    # only those that are not the verb's own options.
    argv, sys.argv = sys.argv, [sys.argv[0], *(words if verb.trains else others)]
    # The user's own losses may be modules in the current folder. It is the last in the path, so
    # that it hides no other module.
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


def _overview() -> str:
    verbs = "\n".join(f"  {name:8} {verb.about}" for name, verb in VERBS.items())
    return (
        f"usage: {program()} [distil | tune | analyse] [options] [--key=value …]\n\n{verbs}\n\n"
        "Without one of these words it distils; without any word it runs an example on ml-100k, a\n"
        "teacher of 256 dimensions and a student of 8, the student alone and with RCE-KD.\n"
        f"The options of each: {program()} distil --help, and so on."
    )


def _verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb and the words after it, also for the older ``--tune=4`` and ``--analyse``."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if "--analyse" in words:
        return "analyse", [word for word in words if word != "--analyse"]
    for i, word in enumerate(words):
        if word == "--tune":
            return "tune", [*words[:i], "--trials", *words[i + 1 :]]
        if word.startswith("--tune="):
            return "tune", [*words[:i], f"--trials={word[7:]}", *words[i + 1 :]]
    return "distil", words
