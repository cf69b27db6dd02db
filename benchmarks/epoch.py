"""What distillation costs: seconds per training epoch and peak memory, each loss against plain RecBole.

    python benchmarks/epoch.py --dataset=citeulike-t --data_path=../shared/data \
        --teacher=../shared/teachers/BPR-400-citeulike-t.pth

All methods train side by side in one process, one epoch each in turn, so that a slow moment of the machine meets them all;
the medians of their epochs are divided. Peak memory needs a process of its own per method. Default settings throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, init_seed
from tabulate import tabulate

import recbole_rcekd  # noqa: F401  (mends RecBole before it is imported)
from recbole_rcekd.teacher import load_teacher
from recbole_rcekd.trainer import distill_trainer, recording_trainer

READY_SPLIT = Path(__file__).parent.parent / "properties" / "dataset" / "ready_split.yaml"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--teacher", required=True, help="a RecBole checkpoint")
    parser.add_argument("--model", default="BPR", help="the student")
    parser.add_argument("--embedding_size", type=int, default=20)
    parser.add_argument("--losses", default="rce,ce,cd,rrd")
    parser.add_argument("--epochs", type=int, default=8, help="measured epochs, after one that is not")
    parser.add_argument("--kd", default="{}", help="KD settings as JSON, over the defaults")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole's Config reads it
    for place in ("data_path", "teacher"):
        setattr(options, place, os.path.abspath(getattr(options, place)))
    folder = os.environ.get("BENCHMARK_FOLDER") or tempfile.mkdtemp()
    os.chdir(folder)
    if options.memory_of:
        epochs_of(options, [options.memory_of], 2)
        print(json.dumps(peak_of_this_process()))
        return
    names = ["plain RecBole", *options.losses.split(",")]
    seconds = epochs_of(options, names, options.epochs + 1)
    memory = {name: memory_of(options, name, folder) for name in names}
    plain = names[0]
    rows = []
    for name in names:
        median = statistics.median(seconds[name][1:])
        ratio = median / statistics.median(seconds[plain][1:])
        rows.append([name, f"{seconds[name][0]:.2f}", f"{median:.3f}", f"{ratio:.2f}", f"{memory[name]:.0f}"])
        rows[-1].append(f"{memory[name] / memory[plain]:.2f}")
    print(
        f"{options.dataset}, {options.model} {options.embedding_size}, teacher {Path(options.teacher).name}; medians of "
        f"{options.epochs} epochs; {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {platform.machine()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    header = ["", "first epoch (s)", "epoch (s)", "ratio", "peak memory (MiB)", "ratio"]
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 5))


def epochs_of(options: argparse.Namespace, names: list[str], epochs: int) -> dict[str, list[float]]:
    """Training seconds of each epoch (lists, loss and diagnostics included), methods taking turns."""
    given = {
        "data_path": options.data_path,
        "embedding_size": options.embedding_size,
        "show_progress": False,
        "state": "WARNING",
        **json.loads(options.kd),
    }
    configs = {}
    for name in names:
        loss = {} if name == "plain RecBole" else {"kd_loss": name}
        configs[name] = Config(options.model, options.dataset, [str(READY_SPLIT)], {**given, **loss})
    config = configs[names[0]]
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    teacher = None
    trainers: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:
            init_seed(0, True)
            model = get_model(options.model)(config, train._dataset).to(config["device"])
            if name == "plain RecBole":
                trainers[name] = recording_trainer(configs[name])(configs[name], model)
            else:
                teacher = teacher or load_teacher(options.teacher, train)
                trainers[name] = distill_trainer(configs[name])(configs[name], model, teacher)
                stack.enter_context(trainers[name].distilling(train))
            trainers[name].history.file = None
        for epoch in range(epochs):
            for name, trainer in trainers.items():
                trainer._train_epoch(train, epoch)
                seconds[name].append(trainer.history.rows[-1]["train_seconds"])
    return seconds


def peak_of_this_process() -> float:
    """Peak resident memory in MiB. Not ``ru_maxrss``: a child inherits its parent's peak in that."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory_of(options: argparse.Namespace, name: str, folder: str) -> float:
    """Peak resident memory, in MiB, of a process that trains two epochs with one method."""
    keys = ("dataset", "data_path", "teacher", "model", "embedding_size", "kd")
    command = [
        sys.executable,
        os.path.abspath(__file__),
        *(f"--{key}={getattr(options, key)}" for key in keys),
        f"--memory_of={name}",
    ]
    environment = {**os.environ, "BENCHMARK_FOLDER": folder}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()
