r"""The time that distillation adds to a training step of a sequential student.

    python benchmarks/sequential.py --dataset=amazon-toys --data_path=../shared/data \
        --teacher=SASRec-64-amazon-toys.pth --model=SASRec --steps=20

A sequential student makes its candidates in the training step, and nothing between epochs. So the
steps are measured: on the same batches, in turn and in one process, by plain RecBole's trainer, by
the student alone with our update, and with distillation. The ratios are of the medians. The
teacher's queries and top-K lists are made once, before the first epoch; their time is printed too.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import (
    PLAIN,
    PLAIN_FASTER,
    config_of,
    machine,
    make_trainer,
    options_of,
    read_data,
    start,
    teacher_for,
)
from tabulate import tabulate

from recbole_rcekd.compat import without_anomaly_detection

SETTINGS: dict[str, Any] = {
    "TIME_FIELD": "timestamp",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "group_by": "user",
        "order": "TO",
        "mode": "full",
    },
    "train_neg_sample_args": None,
    "loss_type": "CE",
}


def main() -> None:
    """Measure and print the table."""
    parser = options_of(__doc__, model="SASRec")
    parser.add_argument("--losses", default="rce")
    parser.add_argument(
        "--steps", type=int, default=20, help="measured steps, after one that is not"
    )
    options = parser.parse_args()
    start(options)
    names = [PLAIN, PLAIN_FASTER, *options.losses.split(",")]
    data = read_data(config_of(options, **SETTINGS))
    teacher = teacher_for(options, data, names)
    trainers = {name: _trainer(name, options, data, teacher) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    prepared = {}
    with ExitStack() as stack:
        for name in options.losses.split(","):
            started = perf_counter()
            distiller = stack.enter_context(trainers[name].distilling(data.train))
            distiller.begin_epoch(0, options.steps)
            # The teacher's lists are made with the first batch.
            trainers[name].model.calculate_loss(next(iter(data.train)))
            prepared[name] = perf_counter() - started
        for batch in islice(iter(data.train), options.steps + 1):
            for name, trainer in trainers.items():
                # RecBole turns anomaly detection on with the import of any sequential model; our
                # trainers turn it off.
                with (
                    torch.autograd.set_detect_anomaly(True)
                    if name == PLAIN
                    else without_anomaly_detection()
                ):
                    seconds[name].append(_step(trainer, batch))
    rows = []
    for name in names:
        median = statistics.median(seconds[name][1:])
        ratios = [statistics.median(seconds[other][1:]) for other in (PLAIN, PLAIN_FASTER)]
        rows.append([name, f"{median:.3f}", *(f"{median / other:.3f}" for other in ratios)])
        rows[-1].append(f"{prepared[name]:.1f}" if name in prepared else "")
    config = data.config
    print(
        f"{options.dataset}, {options.model}, {len(data.train._dataset)} rows in "
        f"{len(data.train)} steps an epoch, batch {config['train_batch_size']}, sequences of "
        f"{config['MAX_ITEM_LIST_LENGTH']}, teacher {Path(options.teacher).name}; medians of "
        f"{options.steps} steps; {machine()}"
    )
    header = [
        "",
        "step (s)",
        "to plain RecBole",
        "to the same without distillation",
        "made once (s)",
    ]
    print(
        tabulate(
            rows,
            header,
            tablefmt="github",
            disable_numparse=True,
            colalign=["left"] + ["right"] * 4,
        )
    )


def _trainer(name: str, options: Any, data: Any, teacher: Any) -> Any:
    distilling = name not in (PLAIN, PLAIN_FASTER)
    config = config_of(options, None, **SETTINGS, **({"kd_loss": name} if distilling else {}))
    return make_trainer(name, options, data, teacher, config)


def _step(trainer: Any, batch: Any) -> float:
    """Take one step, as RecBole's ``_train_epoch`` does; return its seconds."""
    trainer.model.train()
    started = perf_counter()
    trainer.optimizer.zero_grad()
    loss = trainer.model.calculate_loss(batch)
    loss.backward()
    trainer.optimizer.step()
    return perf_counter() - started


if __name__ == "__main__":
    main()
