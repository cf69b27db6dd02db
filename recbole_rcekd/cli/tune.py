"""``tune``: search the settings of each method on the validation data."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from recbole_rcekd.cli.options import Verb, add_training_options, training_arguments
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.tuning import tune_recbole_kd


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)
    search = parser.add_argument_group("the search")
    search.add_argument(
        "--trials",
        type=int,
        default=4,
        metavar="N",
        help="trials of each method (default: 4)",
    )
    search.add_argument(
        "--params_file", help="ranges in RecBole's format (default: properties/hyper/*.test)"
    )
    search.add_argument(
        "--algo",
        default="exhaustive",
        choices=("exhaustive", "random", "bayes"),
        help="the search of RecBole's HyperTuning",
    )
    search.add_argument("--output_dir", help="folder for tuning/best.yaml and the trials")
    # Options of another verb. They are accepted here to be refused with a clear message.
    for key in ("--seeds", "--nproc"):
        search.add_argument(key, help=argparse.SUPPRESS)


def _run(options: argparse.Namespace) -> None:
    if options.seeds is not None or options.nproc not in (None, "1"):
        raise SettingsError(
            "[seeds] and [nproc] have no effect on a search, which trains one at a time."
        )
    with ExitStack() as files:
        tune_recbole_kd(
            options.trials,
            **training_arguments(options, files),
            params_file=options.params_file,
            algo=options.algo,
        )


def _when_stopped(options: argparse.Namespace) -> str:
    again = (
        "the same command goes on with the trials that are not finished"
        if options.output_dir
        else "with --output_dir, the same command would not repeat finished trials"
    )
    return f"What is written so far is whole; {again}."


VERB = Verb(
    "tune",
    "Search the settings of each method, the same number of trials for all, on the validation "
    "data alone (docs/guides/tuning.md).",
    _add_options,
    _run,
    _when_stopped,
)
