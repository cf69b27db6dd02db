r"""Time per training epoch and peak memory of each loss, compared with plain RecBole.

    python benchmarks/epoch.py --dataset=citeulike-t --data_path=../shared/data \
        --teacher=../shared/teachers/BPR-400-citeulike-t.pth

All methods train in one process, one epoch each in turn, so that a slow moment of the machine
affects them all. The ratio is of the medians of their epochs. For the peak memory each method has a
process of its own. All settings have their defaults.

Distilled runs make batches and updates faster than plain RecBole (same batches, same formula). One
row of the table shows the student without a teacher but with these two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from common import (
    PLAIN,
    PLAIN_FASTER,
    config_of,
    machine,
    make_trainer,
    options_of,
    peak_of_this_process,
    read_data,
    start,
    teacher_for,
)
from tabulate import tabulate


def main() -> None:
    """Measure and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--losses", default="rce,ce,cd,rrd")
    parser.add_argument(
        "--epochs", type=int, default=8, help="measured epochs, after one that is not"
    )
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = start(options)
    if options.memory_of:
        epochs_of(options, [options.memory_of], 2)
        print(json.dumps(peak_of_this_process()))
        return
    names = [PLAIN, PLAIN_FASTER, *options.losses.split(",")]
    seconds = epochs_of(options, names, options.epochs + 1)
    memory = {name: memory_of(options, name, folder) for name in names}
    rows = []
    for name in names:
        median = statistics.median(seconds[name][1:])
        ratio = median / statistics.median(seconds[PLAIN][1:])
        rows.append(
            [
                name,
                f"{seconds[name][0]:.2f}",
                f"{median:.3f}",
                f"{ratio:.2f}",
                f"{memory[name]:.0f}",
            ]
        )
        rows[-1].append(f"{memory[name] / memory[PLAIN]:.2f}")
    print(
        f"{options.dataset}, {options.model} {options.embedding_size}, teacher "
        f"{Path(options.teacher).name}; medians of {options.epochs} epochs; {machine()}"
    )
    header = ["", "first epoch (s)", "epoch (s)", "ratio", "peak memory (MiB)", "ratio"]
    print(
        tabulate(
            rows,
            header,
            tablefmt="github",
            disable_numparse=True,
            colalign=["left"] + ["right"] * 5,
        )
    )


def epochs_of(options: argparse.Namespace, names: list[str], epochs: int) -> dict[str, list[float]]:
    """Seconds of each training epoch of each method, with candidates, loss and diagnostics.

    The methods train one epoch each in turn.
    """
    data = read_data(config_of(options))
    teacher = teacher_for(options, data, names)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    trainers = {}
    with ExitStack() as stack:
        for name in names:
            distilling = name not in (PLAIN, PLAIN_FASTER)
            config = config_of(options, **({"kd_loss": name} if distilling else {}))
            trainer = trainers[name] = make_trainer(name, options, data, teacher, config)
            if name != PLAIN:
                trainer.history.file = None
            if distilling:
                stack.enter_context(trainer.distilling(data.train))
        for epoch in range(epochs):
            for name, trainer in trainers.items():
                started = perf_counter()
                trainer._train_epoch(data.train, epoch)
                seconds[name].append(perf_counter() - started)
    return seconds


def memory_of(options: argparse.Namespace, name: str, folder: str) -> float:
    """Peak resident memory, in MiB, of a process that trains two epochs with one method."""
    keys = ("dataset", "data_path", "teacher", "model", "embedding_size", "settings")
    command = [
        sys.executable,
        os.path.abspath(__file__),
        *(f"--{key}={getattr(options, key)}" for key in keys if getattr(options, key) is not None),
        f"--memory_of={name}",
    ]
    environment = {**os.environ, "BENCHMARK_FOLDER": folder}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()
