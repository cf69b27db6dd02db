r"""The time until a distilled student is better than the student ever gets without a teacher.

    python benchmarks/quality.py --dataset=citeulike-t --data_path=../shared/data \
        --teacher=../shared/teachers/BPR-400-citeulike-t.pth \
        --config_file=properties/reproduce/citeulike_mf.yaml

Both train in one process, one epoch and its validation each in turn. The distilled student pauses
while its best validation score is above that of the student alone. The benchmark ends when the
student alone stops by RecBole's early stopping and the distilled one is ahead. The time counts all
parts of a run: training, candidates, validation and opening the teacher.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

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
from recbole.utils import early_stopping
from tabulate import tabulate

from recbole_rcekd.losses.methods import read_methods
from recbole_rcekd.training.run_settings import overrides_for


class Run:
    """A trainer that trains epoch by epoch, with its time and its best validation score."""

    def __init__(self, trainer: Any, data: Any, clock: float = 0.0) -> None:
        self.trainer, self.data, self.clock = trainer, data, clock
        self.epoch, self.best, self.best_at, self.best_epoch = 0, -1.0, 0.0, 0
        self.stopping_step, self.stopped = 0, False

    def advance(self) -> None:
        """Train until the next validation."""
        started, config = perf_counter(), self.data.config
        while True:
            self.trainer._train_epoch(self.data.train, self.epoch)
            self.epoch += 1
            if self.epoch % config["eval_step"] == 0:
                break
        score, _ = self.trainer._valid_epoch(self.data.valid)
        self.clock += perf_counter() - started
        if score > self.best:
            self.best_at, self.best_epoch = self.clock, self.epoch
        self.best, self.stopping_step, self.stopped, _ = early_stopping(
            score,
            self.best,
            self.stopping_step,
            max_step=config["stopping_step"],
            bigger=config["valid_metric_bigger"],
        )


def main() -> None:
    """Train both students and print the table."""
    parser = options_of(__doc__)
    parser.add_argument(
        "--config_file", required=True, help="a property file, as of run_recbole_kd.py"
    )
    parser.add_argument("--loss", default="rce")
    options = parser.parse_args()
    files = [str(Path(options.config_file).resolve())]
    start(options)
    common = config_of(options, files, eval_batch_size=2**20)
    data = read_data(common)
    configs = {}
    for name in ("scratch", options.loss):
        config = configs[name] = config_of(
            options, files, eval_batch_size=2**20, kd_loss=options.loss
        )
        for key, value in overrides_for(read_methods(name)[0], common).items():
            config[key] = value
    alone = Run(make_trainer(PLAIN, options, data, None, configs["scratch"]), data)
    started = perf_counter()
    teacher = teacher_for(options, data, [options.loss])
    trainer = make_trainer(options.loss, options, data, teacher, configs[options.loss])
    trainer.history.file = None
    with trainer.distilling(data.train):
        distilled = Run(trainer, data, perf_counter() - started)
        while not alone.stopped or distilled.best <= alone.best:
            if not alone.stopped:
                alone.advance()
            if distilled.best <= alone.best and not distilled.stopped:
                distilled.advance()
            elif distilled.stopped and alone.stopped:
                break
    metric = common["valid_metric"]
    rows = [
        ["alone, its best", f"{alone.best:.4f}", alone.best_epoch, f"{alone.best_at:.1f}"],
        [
            f"{options.loss}, past that",
            f"{distilled.best:.4f}",
            distilled.epoch,
            f"{distilled.clock:.1f}",
        ],
    ]
    print(
        f"{options.dataset}, {options.model} {options.embedding_size}, "
        f"{Path(options.teacher).name}; {machine()}"
    )
    print(
        tabulate(
            rows,
            ["", f"validation {metric}", "epochs", "seconds"],
            tablefmt="github",
            disable_numparse=True,
        )
    )
    print(f"share of the time: {distilled.clock / alone.best_at:.3f}")


if __name__ == "__main__":
    main()
