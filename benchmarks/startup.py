r"""The time before the first batch of a distilled run, with and without cached teacher scores.

    python benchmarks/startup.py --dataset=gowalla --data_path=../shared/data \
        --teacher=../shared/teachers/BPR-300-gowalla.pth

Each run is a process of its own. After RecBole has read its data, these are measured: opening the
teacher, its scores, its top-K lists, and what distillation prepares. The student's first lists are
made in the first epoch, which ``epoch.py`` measures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from time import perf_counter

from common import (
    PLAIN,
    config_of,
    machine,
    make_trainer,
    options_of,
    read_data,
    start,
    teacher_for,
)
from tabulate import tabulate


def main() -> None:
    """Measure and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = start(options)
    if options.measured:
        print(json.dumps(seconds(options)))
        return
    rows = []
    for what in ("new teacher", "scores in the cache", "scores in the cache"):
        keys = ("dataset", "data_path", "teacher", "model", "embedding_size", "settings")
        command = [
            sys.executable,
            os.path.abspath(__file__),
            *(
                f"--{key}={getattr(options, key)}"
                for key in keys
                if getattr(options, key) is not None
            ),
        ]
        environment = {**os.environ, "BENCHMARK_FOLDER": folder}
        done = subprocess.run(
            [*command, "--measured"], capture_output=True, text=True, check=True, env=environment
        )
        rows.append([what, *(f"{x:.2f}" for x in json.loads(done.stdout.strip().splitlines()[-1]))])
    print(f"{options.dataset}, {options.model}; {machine()}")
    print(
        tabulate(
            rows,
            ["", "teacher and scores (s)", "its lists (s)", "RecBole's own start (s)"],
            tablefmt="github",
        )
    )


def seconds(options: argparse.Namespace) -> list[float]:
    """The seconds for teacher and scores, for lists, and for RecBole's own start."""
    started = perf_counter()
    data = read_data(config_of(options))
    # What every run of RecBole needs is not counted. (Torch imports its compiler when the first
    # optimizer is built.)
    make_trainer(PLAIN, options, data, None, data.config)
    read = perf_counter()
    trainer = make_trainer(
        "rce", options, data, teacher_for(options, data, ["rce"]), config_of(options, kd_loss="rce")
    )
    with trainer.distilling(data.train) as distiller:
        opened = perf_counter()
        side = distiller._sides[0]
        side.teacher.top_k(side.contexts, distiller.loss.settings.rce_top_k, False)
        listed = perf_counter()
    return [opened - read, listed - opened, read - started]


if __name__ == "__main__":
    main()
