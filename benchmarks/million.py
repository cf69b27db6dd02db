"""The cost of a million users and a million items on one machine.

    python benchmarks/million.py --sizes=100000,1000000 --steps=1000 [--loss=fce]

The data are synthetic: as many users as items, and 20 interactions a user. Teacher and student (a
RecBole BPR) have random tables of 32 dimensions. The method is RCE-KD with its defaults, or with
``--loss=fce`` the cross-entropy over the catalogue with an estimated normaliser. For each size,
these are measured in a process of its own:

* writing the teacher's scores to the cache, and reading them;
* making the candidates of 1 % of the users, from the teacher's and the student's top-K;
* training steps (2,048 rows, uniform negatives, Adam) with and without the KD term of these users;
* the peak memory.

Reading the data with RecBole is left out: for 20 million rows it takes longer than all of this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from common import machine, peak_of_this_process
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR
from tabulate import tabulate
from torch import Tensor

from recbole_rcekd.core.store import Store
from recbole_rcekd.core.types import Seen
from recbole_rcekd.losses import FCELoss, KDLoss, RCELoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.fce import FCESettings
from recbole_rcekd.losses.rce import RCESettings
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.score_tables import FactorScores
from recbole_rcekd.training.optimizer import update_in_one_pass

PER_USER, DIMENSIONS, ROWS, TOP_K = 20, 32, 2048, 50
LOSSES: dict[str, KDLoss] = {
    "rce": RCELoss(RCESettings(rce_top_k=TOP_K)),
    "fce": FCELoss(FCESettings(fce_top_k=TOP_K, fce_normaliser="sampled")),
}


def main() -> None:
    """Start a process for each size, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="100000,1000000", help="users, and as many items")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--loss", choices=LOSSES, default="rce")
    parser.add_argument("--measured", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    if options.measured:
        print(json.dumps(measure(options.measured, options.steps, options.loss)))
        return
    columns = []
    for size in options.sizes.split(","):
        given = (f"--measured={size}", f"--steps={options.steps}", f"--loss={options.loss}")
        command = [sys.executable, os.path.abspath(__file__), *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        columns.append(json.loads(done.stdout.strip().splitlines()[-1]))
    rows = []
    for what in columns[0]:
        values = [column[what] for column in columns]
        growth = f"{values[-1] / values[0]:.1f}" if len(values) > 1 else ""
        rows.append([what, *(f"{value:.3g}" for value in values), growth])
    print(f"d = {DIMENSIONS}, {PER_USER} interactions a user, {options.steps} steps; {machine()}")
    print(
        tabulate(
            rows,
            ["", *options.sizes.split(","), "growth"],
            tablefmt="github",
            disable_numparse=True,
        )
    )


def measure(n: int, steps: int, name: str) -> dict[str, float]:
    """All measurements for ``n`` users and ``n`` items."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    users = torch.repeat_interleave(torch.arange(1, n + 1), PER_USER)
    items = torch.randint(1, n + 1, (len(users),))
    seen = Seen.from_pairs(users, items, n + 1, n + 1)
    with tempfile.TemporaryDirectory() as folder:
        store, started = Store(Path(folder)), perf_counter()
        factors = {side: torch.randn(n + 1, DIMENSIONS).numpy() for side in ("users", "items")}
        store.write("factors", factors)
        found["teacher's tables to the cache (s)"] = perf_counter() - started
        del factors
        started = perf_counter()
        read = store.read("factors")
        found["and from it (s)"] = perf_counter() - started
    if read is None:
        raise RuntimeError("the store lost an entry")
    teacher = FactorScores(*(torch.from_numpy(read[side]) for side in ("users", "items")), seen)

    model, scorer = student(n)
    loss = LOSSES[name]
    taught = torch.randperm(n, generator=generator)[: n // 100] + 1
    with scorer.evaluating():
        ranking, by_teacher = scorer.ranking(), teacher._ranking()
        started = perf_counter()
        teacher_top = by_teacher.top_k(taught, TOP_K)
        found["teacher's list, per user (ms)"] = (perf_counter() - started) / len(taught) * 1e3
        source = OwnLists(teacher, taught, teacher_top)
        started, sets = perf_counter(), None
        for part in torch.split(torch.arange(len(taught)), 1024):
            block = loss.select(
                Candidates(
                    taught[part],
                    source,  # type: ignore[arg-type]
                    ranking,
                    seen,
                    generator,
                )
            )
            sets = sets or block.empty_like(n + 1)  # for all users, as in a run
            sets.put(taught[part], block)
        found["student's list and item set, per user (ms)"] = (
            (perf_counter() - started) / len(taught) * 1e3
        )

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    update_in_one_pass(optimizer)

    def step(with_kd: bool) -> None:
        rows = torch.randint(len(users), (ROWS,), generator=generator)
        batch = {"user_id": users[rows], "item_id": items[rows]}
        batch["neg_item_id"] = torch.randint(1, n + 1, (ROWS,), generator=generator)
        optimizer.zero_grad()
        total = model.calculate_loss(Interaction(batch))
        if with_kd:
            # So many users a step that an epoch of 20 n / 2,048 steps visits each user once.
            contexts = taught[
                torch.randint(len(taught), (max(1, ROWS // PER_USER),), generator=generator)
            ]
            mine = sets.rows(contexts)
            total = total + 10.0 * loss.forward(scorer.score(contexts, mine.items), mine).mean()
        total.backward()
        optimizer.step()

    stack = ExitStack()
    stack.enter_context(scorer.sparse_gradients())
    for with_kd, label, count in (
        (False, "step, plain (ms)", max(20, steps // 10)),
        (True, f"step, {name} (ms)", steps),
    ):
        step(with_kd)
        started = perf_counter()
        for _ in range(count):
            step(with_kd)
        found[label] = (perf_counter() - started) / count * 1e3
    found["peak memory (GiB)"] = peak_of_this_process() / 1024
    return found


class OwnLists:
    """A teacher that has top-K lists for some users only, made before; it scores all users."""

    def __init__(self, teacher: FactorScores, contexts: Tensor, lists: Tensor) -> None:
        self.n_contexts, self.n_items, self.score = (
            teacher.n_contexts,
            teacher.n_items,
            teacher.score,
        )
        self._lists = lists
        self._row = torch.full((teacher.n_contexts,), -1)
        self._row[contexts] = torch.arange(len(contexts))

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """The lists made before."""
        return self._lists[self._row[contexts], :k]


def student(n: int) -> tuple[Any, ModelScorer]:
    """RecBole's BPR for ``n`` users and items."""
    dataset = SimpleNamespace(
        uid_field="user_id", iid_field="item_id", user_num=n + 1, item_num=n + 1
    )
    dataset.num = lambda field: n + 1
    dataset.field2type = dataset.field2source = {}
    config = Config("BPR", "ml-100k", config_dict={"embedding_size": DIMENSIONS, "state": "ERROR"})
    model = BPR(config, dataset)
    return model, ModelScorer(model, dataset, trainable=True)


if __name__ == "__main__":
    main()
