"""``analyse``: compare a student with its teacher; nothing is trained."""

from __future__ import annotations

import argparse

from recbole_rcekd.cli.options import Verb
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.evaluation.analysis import analyse
from recbole_rcekd.evaluation.tables import as_text

# Options of the other verbs. They are accepted here to be refused with a clear message.
_WITHOUT_EFFECT = (
    *("model", "kd_loss", "seeds", "config_files", "params_file", "trials"),
    *("nproc", "world_size"),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    looked_at = parser.add_argument_group("two checkpoints")
    looked_at.add_argument(
        "--teacher", "-t", help="a RecBole checkpoint, a file of scores, or several"
    )
    looked_at.add_argument(
        "--student", help="the checkpoint of the student; data and split are its own"
    )
    looked_at.add_argument("--baseline", help="the checkpoint of the same student, trained alone")
    looked_at.add_argument(
        "--analyse_users",
        type=int,
        default=1000,
        help="how many training users are compared; 0: all (default: 1000)",
    )
    looked_at.add_argument("--dataset", "-d", help="the student's dataset; need not be given")
    courses = parser.add_argument_group("histories of several runs")
    courses.add_argument(
        "--history",
        help="output_dir of a command, or a history.csv; several separated by commas",
    )
    parser.add_argument_group("where to").add_argument(
        "--output_dir", help="folder for analysis.json, analysis.md and the curves"
    )
    for key in _WITHOUT_EFFECT:
        parser.add_argument(f"--{key}", help=argparse.SUPPRESS)


def _run(options: argparse.Namespace) -> None:
    alone = {"nproc": ("1",), "world_size": ("-1", "0", "1")}
    for key in _WITHOUT_EFFECT:
        value = getattr(options, key)
        if value is not None and value not in alone.get(key, ()):
            raise SettingsError(f"[{key}] has no effect on an analysis: leave it out.")
    result = analyse(
        options.teacher,
        options.student,
        options.baseline,
        options.history,
        options.analyse_users,
        options.output_dir,
        options.dataset,
    )
    print(as_text(result))
    if options.output_dir:
        print(f"\nWritten to [{options.output_dir}].")


VERB = Verb(
    "analyse",
    "Compare the checkpoints of a student and its teacher, or the histories of several runs. "
    "Nothing is trained (docs/guides/analysis.md).",
    _add_options,
    _run,
    trains=False,
)
