"""The parts that the verbs share: reading their options, and the options of a training."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from recbole_rcekd.losses import LOSSES


def program() -> str:
    """How the command was called: ``run_recbole_kd.py``, or the installed ``run-recbole-kd``."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("run") else "run_recbole_kd.py"


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Args:
        name: the verb.
        about: one or two sentences for ``--help``.
        add_options: a function that adds the verb's options to a parser.
        run: a function that runs the command.
        when_stopped: a function that returns the message after Ctrl-C.
        trains: the command trains students.
        foreign: options of other verbs, as pairs (option, verb).
    """

    name: str
    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    when_stopped: Callable[[argparse.Namespace], str] = lambda options: ""
    trains: bool = True
    foreign: tuple[tuple[str, str], ...] = ()

    def read(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Split words into the verb's options and all others, which must be ``--key=value``.

        For another word and for ``--help`` it prints a message and ends the process, as argparse
        does.
        """
        parser = argparse.ArgumentParser(
            prog=f"{program()} {self.name}",
            description=self.about,
            epilog="Anything else as --key=value: RecBole's own keys, ours (properties/*.yaml), "
            "and teacher_ keys.",
            allow_abbrev=False,
        )
        self.add_options(parser)
        known, others = parser.parse_known_args(words)
        for other in others:
            for key, verb in self.foreign:
                if other.split("=")[0] == f"--{key}":
                    parser.error(f"--{key} is for {verb}: {program()} {verb} …")
            if not re.match(r"--\w+=", other):
                parser.error(
                    f"{other} is not understood: write RecBole's keys, and ours, as --key=value"
                )
        return known, others


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verbs that train students."""
    group = parser.add_argument_group("what is trained")
    group.add_argument("--model", "-m", help="the student, a RecBole model name")
    group.add_argument("--dataset", "-d", help="RecBole dataset name")
    group.add_argument(
        "--config_files", "--config_file", help='RecBole property files: "a.yaml b.yaml"'
    )
    group.add_argument(
        "--teacher",
        "-t",
        help="a model name (trained now), a RecBole checkpoint, a file of scores, or several: "
        "a.pth,b.csv",
    )
    group.add_argument(
        "--kd_loss",
        "-l",
        help=f"one or more of scratch, {', '.join(LOSSES)}, with commas between; sums (rce+freqd); a loss of your own "
        "(my_module:MyLoss)",
    )


def training_arguments(options: argparse.Namespace, files: ExitStack) -> dict[str, Any]:
    """The arguments of :func:`~recbole_rcekd.quick_start.run_recbole_kd` that the options give.

    Without model, dataset, teacher and config files, they are those of the example on ml-100k.

    Args:
        options: the options of :func:`add_training_options`, and ``output_dir``.
        files: keeps the example's property file while the command runs.
    """
    named = (options.config_files or "").split()
    if not (options.model or options.dataset or options.teacher or named):
        example = resources.files("recbole_rcekd.properties") / "quick_start.yaml"
        named = [str(files.enter_context(resources.as_file(example)))]
    return {
        "model": options.model,
        "dataset": options.dataset,
        "config_file_list": named or None,
        "teacher": options.teacher,
        "kd_loss": options.kd_loss,
        "output_dir": options.output_dir,
    }
