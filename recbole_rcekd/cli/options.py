"""What the verbs share: how their options are read, and the keys of a training."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from typing import Any

from recbole_rcekd.losses import LOSSES

PROGRAM = "run_recbole_kd.py"


@dataclass(frozen=True)
class Verb:
    """One command.

    Args:
        name: as it is written.
        about: one or two sentences for ``--help``.
        add_options: gives a parser the options.
        run: does it.
        when_stopped: what the user should know after Ctrl-C.
        trains: whether students are trained.
        foreign: (option, verb): options that belong to another verb.
    """

    name: str
    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    when_stopped: Callable[[argparse.Namespace], str] = lambda options: ""
    trains: bool = True
    foreign: tuple[tuple[str, str], ...] = ()

    def read(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The verb's options, and all other words, each of which is ``--key=value``.

        Ends the process, as argparse does, with a message where a word is neither, and for
        ``--help``.
        """
        parser = argparse.ArgumentParser(
            prog=f"{PROGRAM} {self.name}",
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
                    parser.error(f"--{key} is for {verb}: {PROGRAM} {verb} …")
            if not re.match(r"--\w+=", other):
                parser.error(
                    f"{other} is not understood: write RecBole's keys, and ours, as --key=value"
                )
        return known, others


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of whatever trains students."""
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
        help=f"one or more of scratch,{','.join(LOSSES)}; sums (rce+freqd); a loss of your own "
        "(my_module:MyLoss)",
    )


def training_arguments(options: argparse.Namespace, files: ExitStack) -> dict[str, Any]:
    """What :func:`~recbole_rcekd.quick_start.run_recbole_kd` is called with.

    Without any of these options: the example on ml-100k.

    Args:
        options: of :func:`add_training_options`.
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
