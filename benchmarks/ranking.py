r"""The time of making the top-200 of all users, compared with the product that makes the scores.

    python benchmarks/ranking.py --dataset=gowalla --data_path=../shared/data \
        --teacher=../shared/teachers/BPR-300-gowalla.pth

The students have 20 and 64 dimensions and are distilled for a few epochs first, because untrained
tables take another time. All lists are exact; the last column counts ids that differ from a full
sort in float32 (by ties and rounding). faiss is measured if it is installed; this package does not
need it.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from common import (
    config_of,
    machine,
    make_trainer,
    median_seconds,
    options_of,
    read_data,
    start,
    teacher_for,
)
from tabulate import tabulate
from torch import Tensor

from recbole_rcekd.core.top_k import CELLS_AT_A_TIME, ProductRanking, RowRanking

K = 200


def main() -> None:
    """Train the students, measure, and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--dims", default="20,64")
    parser.add_argument(
        "--epochs", type=int, default=10, help="of distillation before the measurement"
    )
    parser.add_argument(
        "--users", type=int, default=4096, help="measured users, drawn at random; 0: all"
    )
    options = parser.parse_args()
    start(options)
    rows = []
    for dims in options.dims.split(","):
        options.embedding_size = int(dims)
        users, items = tables(options)
        generator = torch.Generator().manual_seed(0)
        who = torch.randperm(len(users) - 1, generator=generator)[: options.users or None] + 1
        rows += measure(users, items, who)
    print(f"{options.dataset}, top-{K}; medians of 5; {machine()}")
    header = ["d", "way", "µs per user", "of the product", "other ids than a full sort"]
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def tables(options: object) -> tuple[Tensor, Tensor]:
    """The user and item tables of a student after some epochs."""
    config = config_of(options, kd_loss="rce")  # type: ignore[arg-type]
    data = read_data(config)
    teacher = teacher_for(options, data, ["rce"])  # type: ignore[arg-type]
    trainer = make_trainer("rce", options, data, teacher, config)  # type: ignore[arg-type]
    trainer.history.file = None
    with trainer.distilling(data.train):
        for epoch in range(options.epochs):  # type: ignore[attr-defined]
            trainer._train_epoch(data.train, epoch)
    model = trainer.model
    return model.user_embedding.weight.detach(), model.item_embedding.weight.detach()


def measure(users: Tensor, items: Tensor, who: Tensor) -> list[list[str]]:
    """One row of the table for each way to make the lists."""

    def score_all(contexts: Tensor) -> Tensor:
        scores = users[contexts] @ items.t()
        scores[:, 0] = -torch.inf
        return scores

    def bare(block: int) -> None:
        for part in who.split(block):
            users[part] @ items.t()

    def full_sort() -> Tensor:
        return torch.cat([score_all(part).topk(K).indices for part in who.split(16)])

    # The product is measured with its best size of blocks.
    product = min(
        median_seconds(partial(bare, block), 5)
        for block in (8, 16, CELLS_AT_A_TIME // len(items), 64)
    )
    ways = {
        "torch.topk of full rows": full_sort,
        "top-K of groups (without bfloat16)": lambda: RowRanking(score_all, len(items)).top_k(
            who, K
        ),
        "here": lambda: ProductRanking(lambda contexts: users[contexts], items).top_k(who, K),
    }
    if importlib.util.find_spec("faiss"):
        ways["faiss IndexFlatIP"] = partial(with_faiss, users[who], items)
    per_user, reference = 1e6 / len(who), full_sort()
    rows = [[str(items.shape[1]), "product, best block", f"{product * per_user:.1f}", "1.00", ""]]
    for name, way in ways.items():
        seconds, other = median_seconds(way, 5), int((way() != reference).sum())
        rows.append(
            [
                "",
                name,
                f"{seconds * per_user:.1f}",
                f"{seconds / product:.2f}",
                f"{other} of {reference.numel()}",
            ]
        )
    return rows


def with_faiss(queries: Tensor, items: Tensor) -> Tensor:
    """The same lists by faiss, with as many threads as the others."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items[1:].numpy())
    return torch.from_numpy(index.search(queries.numpy(), K)[1]) + 1


if __name__ == "__main__":
    main()
