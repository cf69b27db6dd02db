"""What the benchmarks share: options, data, trainers, and a description of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from recbole.config import Config
from recbole.data import data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_rcekd.data.sequence_dataset import create_dataset
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.training.optimizer import update_in_one_pass
from recbole_rcekd.training.recording import recording_trainer
from recbole_rcekd.training.trainer import distill_trainer

READY_SPLIT = Path(__file__).parent.parent / "properties" / "dataset" / "ready_split.yaml"
PLAIN, PLAIN_FASTER = "plain RecBole", "plain, our batches and update"


def options_of(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark on real data."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument(
        "--data_path", help="where datasets are; RecBole's own default without (it has ml-100k)"
    )
    parser.add_argument("--teacher", required=True, help="a RecBole checkpoint")
    parser.add_argument("--model", default=defaults.get("model", "BPR"), help="the student")
    parser.add_argument("--embedding_size", type=int, default=20)
    parser.add_argument(
        "--settings", default="{}", help="RecBole and KD settings as JSON, over the defaults"
    )
    return parser


def start(options: argparse.Namespace) -> str:
    """Change to a new folder, and return it.

    The arguments are removed from ``sys.argv``, because RecBole's Config would read them.
    """
    sys.argv = sys.argv[:1]
    for place in ("data_path", "teacher"):
        if getattr(options, place, None):
            setattr(options, place, os.path.abspath(getattr(options, place)))
    folder = os.environ.get("BENCHMARK_FOLDER") or tempfile.mkdtemp()
    os.chdir(folder)
    return folder


def machine() -> str:
    """The machine and the versions, to print above a table."""
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {platform.machine()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}"
    )


class Data(NamedTuple):
    """One split, and the Config that it was made with."""

    config: Any
    train: Any
    valid: Any
    test: Any


def config_of(options: argparse.Namespace, files: list[str] | None = None, **extra: Any) -> Any:
    """RecBole's Config without progress bars and messages."""
    given = {"embedding_size": options.embedding_size, "show_progress": False, "state": "WARNING"}
    files = list(files or [])
    if options.data_path:
        given["data_path"] = options.data_path
        if (Path(options.data_path) / options.dataset / f"{options.dataset}.train.inter").exists():
            files.insert(0, str(READY_SPLIT))
    return Config(
        options.model, options.dataset, files, {**given, **json.loads(options.settings), **extra}
    )


def read_data(config: Any) -> Data:
    """The split of ``config``."""
    init_seed(config["seed"], True)
    return Data(config, *data_preparation(config, create_dataset(config)))


def make_trainer(
    name: str, options: argparse.Namespace, data: Data, teacher: Teacher | None, config: Any
) -> Any:
    """A trainer by its name.

    It is RecBole's own trainer, the same with our batches and update, or a distilling one; then
    ``name`` is the loss.
    """
    init_seed(0, True)
    model = get_model(options.model)(config, data.train._dataset).to(config["device"])
    if name == PLAIN:
        return get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    if name == PLAIN_FASTER:
        trainer = recording_trainer(config)(config, model)
        update_in_one_pass(trainer.optimizer)
        return trainer
    if teacher is None:
        raise ValueError(f"{name} needs a teacher")
    return distill_trainer(config)(config, model, teacher)


def teacher_for(options: argparse.Namespace, data: Data, names: list[str]) -> Teacher | None:
    """The teacher, if any of the methods needs one."""
    wanted = any(name not in (PLAIN, PLAIN_FASTER) for name in names)
    return read_teacher(options.teacher, data.train) if wanted else None


def peak_of_this_process() -> float:
    """Peak resident memory in MiB, not ``ru_maxrss``, where a child inherits its parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def median_seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """Median of some repeats, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        started = perf_counter()
        function()
        times.append(perf_counter() - started)
    return statistics.median(times)
