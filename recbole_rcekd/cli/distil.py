"""``distil``: train a teacher, if there is none yet, and students with and without it."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from recbole_rcekd.cli.options import Verb, add_training_options, training_arguments
from recbole_rcekd.core.distributed import run_ranks
from recbole_rcekd.quick_start import run_recbole_kd


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)
    out = parser.add_argument_group("how often, and where to")
    out.add_argument("--seeds", help="0,1,2: repeat with these seeds, on one split and teacher")
    out.add_argument("--output_dir", help="folder for result.json and the histories")
    several = parser.add_argument_group("several processes")
    several.add_argument(
        "--nproc", type=int, default=1, help="processes on this machine, that share the training"
    )
    several.add_argument(
        "--world_size", type=int, default=-1, help="processes on all machines (default: nproc)"
    )
    several.add_argument(
        "--group_offset", type=int, default=0, help="rank of this machine's first process"
    )
    several.add_argument("--ip", default="localhost", help="machine of the first process of all")
    several.add_argument(
        "--port", type=int, help="port there (default: 5678; on one machine any free one)"
    )


def _run(options: argparse.Namespace) -> None:
    with ExitStack() as files:
        arguments = {**training_arguments(options, files), "seeds": options.seeds}
        if options.nproc == 1 and options.world_size <= 0:
            run_recbole_kd(**arguments)
            return
        run_ranks(
            run_recbole_kd,
            arguments,
            options.nproc,
            options.world_size,
            options.ip,
            options.port,
            options.group_offset,
        )


def _when_stopped(options: argparse.Namespace) -> str:
    again = (
        "the same command goes on with what is not finished, from its beginning"
        if options.output_dir
        else "with --output_dir, the same command would not repeat what is finished"
    )
    return f"Checkpoints and histories so far are whole; {again}."


VERB = Verb(
    "distil",
    "Distil a RecBole model into a smaller one (the default).",
    _add_options,
    _run,
    _when_stopped,
    foreign=(
        *((key, "analyse") for key in ("student", "baseline", "history", "analyse_users")),
        *((key, "tune") for key in ("trials", "params_file", "algo")),
    ),
)
