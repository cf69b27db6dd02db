"""The command line: RecBole's habits, plus ``--teacher``, ``--kd_loss``, ``--seeds`` and ``--output_dir``."""

from __future__ import annotations

import argparse
import re
import sys
from importlib import resources
from typing import Any

from recbole_rcekd.core.distributed import run_ranks
from recbole_rcekd.core.errors import KDError, SettingsError
from recbole_rcekd.evaluation.analysis import analyse
from recbole_rcekd.evaluation.tables import as_text
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.quick_start import run_recbole_kd
from recbole_rcekd.tuning import tune_recbole_kd


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="run_recbole_kd.py",
        description="Distil a RecBole model into a smaller one. Without arguments: ml-100k, a teacher of 256 dimensions, "
        "a student of 8, the student alone and with RCE-KD.",
        epilog="Anything else as --key=value: RecBole's own keys, KD keys (properties/*.yaml), and teacher_ keys.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", help="the student, a RecBole model name")
    parser.add_argument("--dataset", "-d", help="RecBole dataset name")
    parser.add_argument(
        "--config_files", "--config_file", help='RecBole property files: "a.yaml b.yaml"'
    )
    parser.add_argument(
        "--teacher",
        "-t",
        help="a model name (trained now), a RecBole checkpoint, a file of scores, or several: a.pth,b.csv",
    )
    parser.add_argument("--kd_loss", "-l", help=f"one or more of scratch,{','.join(LOSSES)}")
    parser.add_argument("--seeds", help="0,1,2: repeat with these on one split and one teacher")
    parser.add_argument("--output_dir", help="folder for result.json and the histories")
    parser.add_argument(
        "--tune",
        type=int,
        metavar="N",
        help="search the settings of each method, N trials each, on the validation data",
    )
    parser.add_argument(
        "--params_file",
        help="with --tune: ranges in RecBole's format (default: properties/hyper/*.test)",
    )
    parser.add_argument(
        "--algo",
        default="exhaustive",
        choices=("exhaustive", "random", "bayes"),
        help="with --tune: how RecBole's HyperTuning goes through the ranges",
    )
    parser.add_argument(
        "--nproc", type=int, default=1, help="processes on this machine, that share the training"
    )
    parser.add_argument(
        "--world_size", type=int, default=-1, help="processes on all machines (default: nproc)"
    )
    parser.add_argument(
        "--group_offset", type=int, default=0, help="rank of this machine's first process"
    )
    parser.add_argument("--ip", default="localhost", help="machine of the first process of all")
    parser.add_argument(
        "--port", type=int, help="port there (default: 5678; on one machine any free one)"
    )
    looking = parser.add_argument_group("nothing is trained, something is looked at")
    looking.add_argument(
        "--analyse",
        action="store_true",
        help="what --student understood of --teacher, or the courses of trainings side by side (--history); docs/analysis.md",
    )
    looking.add_argument(
        "--student", help="the checkpoint of the student; data and split are its own"
    )
    looking.add_argument("--baseline", help="the checkpoint of the same student, trained alone")
    looking.add_argument(
        "--history",
        help="output_dir of a training, or its history.csv; several with commas between",
    )
    looking.add_argument(
        "--analyse_users",
        type=int,
        default=1000,
        help="training users looked at in full; 0: all (default: 1000)",
    )
    known, others = parser.parse_known_args(arguments)
    for other in others:
        if not re.match(r"--\w+=", other):
            parser.error(
                f"{other} is not understood: write RecBole's keys, and ours, as --key=value"
            )
    if known.analyse:
        return _analyse(known, others)
    for key in ("student", "baseline", "history"):
        if getattr(known, key):
            parser.error(f"--{key} is for --analyse")

    files = (known.config_files or "").split()
    if not (known.model or known.dataset or known.teacher or files):
        with resources.as_file(
            resources.files("recbole_rcekd.properties") / "quick_start.yaml"
        ) as default:
            files = [str(default)]
    argv = sys.argv
    if arguments is not None:
        sys.argv = [argv[0], *arguments]  # where RecBole's Config looks for all other keys
    try:
        run: dict[str, Any] = {
            "model": known.model,
            "dataset": known.dataset,
            "config_file_list": files or None,
            "teacher": known.teacher,
            "kd_loss": known.kd_loss,
            "seeds": known.seeds,
            "output_dir": known.output_dir,
        }
        if known.tune is not None:
            if run.pop("seeds") is not None or known.nproc > 1:
                print(
                    "error: [seeds] and [nproc] have no effect on a search, which trains one at a "
                    "time.",
                    file=sys.stderr,
                )
                return 2
            tune_recbole_kd(known.tune, **run, params_file=known.params_file, algo=known.algo)
        elif known.nproc == 1 and known.world_size <= 0:
            run_recbole_kd(**run)
        else:
            run_ranks(
                run_recbole_kd,
                run,
                known.nproc,
                known.world_size,
                known.ip,
                known.port,
                known.group_offset,
            )
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = (
            "the same command goes on with what is not finished, from its beginning"
            if known.output_dir
            else "with --output_dir, the same command would not repeat what is finished"
        )
        print(f"Stopped. Checkpoints and histories so far are whole; {again}.", file=sys.stderr)
        return 130
    finally:
        sys.argv = argv
    return 0


def _analyse(known: argparse.Namespace, others: list[str]) -> int:
    argv = sys.argv
    sys.argv = [argv[0], *others]  # where RecBole's Config looks for all other keys
    try:
        several = {"nproc": known.nproc > 1, "world_size": known.world_size > 1}
        for key in ("model", "kd_loss", "seeds", "config_files", "tune", "params_file", *several):
            if several.get(key, getattr(known, key)):
                raise SettingsError(f"[{key}] has no effect on an analysis: leave it out.")
        result = analyse(
            known.teacher,
            known.student,
            known.baseline,
            known.history,
            known.analyse_users,
            known.output_dir,
            known.dataset,
        )
        print(as_text(result))
        if known.output_dir:
            print(f"\nWritten to [{known.output_dir}].")
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        sys.argv = argv
    return 0
