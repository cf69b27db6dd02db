r"""The closure of RCE-KD's sampled sets, by the number of samples L and the temperature T.

    python benchmarks/closure.py --dataset=citeulike-t --data_path=../shared/data \
        --teacher=../shared/teachers/BPR-400-citeulike-t.pth \
        --config_file=properties/reproduce/citeulike_mf.yaml

One student is distilled. After some epochs, sets are drawn for the same users with each L and T,
from the student as it is then. J is the teacher's top-K without the student's top-K; A is J and the
samples. The table shows the mean closure gap Δ(A) in nats, and the share of the blockers that are
in A: a blocker is an item that the student ranks above an item of J.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import config_of, machine, make_trainer, options_of, read_data, start, teacher_for
from tabulate import tabulate

from recbole_rcekd.core.closure import blockers_covered, mean_closure_gaps
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.methods import read_method
from recbole_rcekd.losses.rce import RCELoss, RCESettings
from recbole_rcekd.training.run_settings import overrides_for

UNIFORM = 1e9


def main() -> None:
    """Train a student, and print a table after some epochs."""
    parser = options_of(__doc__)
    parser.add_argument(
        "--config_file", required=True, help="a property file, as of run_recbole_kd.py"
    )
    parser.add_argument("--epochs", default="2,5,30", help="measure after so many")
    parser.add_argument("--samples", default="0,10,25,50,100,200", help="L")
    parser.add_argument(
        "--temperatures", default="0.25,0.5,1,2,5,10,50", help="T, beside uniform draws"
    )
    parser.add_argument("--users", type=int, default=512)
    options = parser.parse_args()
    files = [str(Path(options.config_file).resolve())]
    start(options)
    config = config_of(options, files, kd_loss="rce")
    for key, value in overrides_for(read_method("rce"), config).items():
        config[key] = value
    data = read_data(config)
    trainer = make_trainer("rce", options, data, teacher_for(options, data, ["rce"]), config)
    trainer.history.file = None
    stops = [int(epoch) for epoch in options.epochs.split(",")]
    print(
        f"{options.dataset}, {options.model} {options.embedding_size}, "
        f"{Path(options.teacher).name}; {machine()}"
    )
    with trainer.distilling(data.train) as distiller:
        side = distiller._sides[0]
        users = torch.randperm(len(side.contexts), generator=torch.Generator().manual_seed(0))[
            : options.users
        ]
        for epoch in range(max(stops)):
            trainer._train_epoch(data.train, epoch)
            if epoch + 1 in stops:
                with distiller._scorer.evaluating():
                    show(
                        epoch + 1, distiller._lists(side, users, epoch), side.loss.settings, options
                    )


def show(n_epochs: int, lists: Candidates, settings: RCESettings, options: Any) -> None:
    """Print the table of the student as it is now, and the temperature that ``auto`` chooses."""
    rows = lists.student_scores_of_all()
    samples = [int(n) for n in options.samples.split(",")]
    table = []
    for temperature in [*map(float, options.temperatures.split(",")), UNIFORM]:
        cells = []
        for n in samples:
            loss = RCELoss(
                dataclasses.replace(settings, rce_samples=n, rce_sampling_temperature=temperature)
            )
            targets, support = loss.closure_sets(loss.select(lists))
            (gap,) = mean_closure_gaps(targets, [support], rows)
            cells.append(f"{gap:.2f} ({100 * blockers_covered(targets, support, rows):.1f} %)")
        table.append(["uniform" if temperature == UNIFORM else f"{temperature:g}", *cells])
    auto = RCELoss(dataclasses.replace(settings, rce_sampling_temperature="auto"))
    started = perf_counter()
    auto.tune(lists.part(torch.arange(64)))
    taken, seconds = auto.metrics()["sampling_temperature"], perf_counter() - started
    print(
        f"\nafter {n_epochs} epochs; auto takes T = {taken:g} for L = {settings.rce_samples}, in "
        f"{seconds:.2f} s\n"
    )
    print(
        tabulate(
            table, ["T", *(f"L = {n}" for n in samples)], tablefmt="github", disable_numparse=True
        )
    )


if __name__ == "__main__":
    main()
