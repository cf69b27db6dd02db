"""Test metrics on all items, and on the coldest fifth of them alone, for one or more checkpoints.

    python benchmarks/coldest.py saved/teacher-VBPR-….pth saved/BPR-….pth --data_path=DATA

Every checkpoint is opened with its own Config, and so with its own split. The whole catalogue is
ranked for each test user, with the user's training and validation items masked, as in RecBole. The
coldest fifth are the items with the fewest training interactions, among all that occur in the data
(ties in the order of the ids). In its rows of the table the ranking is the same, but only test
interactions with cold items are relevant; users without any are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, init_seed
from tabulate import tabulate
from torch import Tensor

from recbole_rcekd.teachers.safe_load import read_checkpoint

NDCG_AT, RECALL_AT = 10, 20


class Opened(NamedTuple):
    """A checkpoint's model, and its training and test data."""

    model: Any
    dataset: Any
    train: Any
    test: Any


class Metrics(NamedTuple):
    """Means over the users with relevant items, and the numbers of users and relevant items."""

    ndcg: float
    recall: float
    users: int
    relevant: int


def main() -> None:
    """Rank for each checkpoint and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--data_path", help="where datasets are, if not where they were in training"
    )
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole would read the arguments
    rows = []
    for path in options.checkpoints:
        opened = open_checkpoint(path, options.data_path)
        for name, found in zip(("all", "coldest fifth"), measure(opened), strict=True):
            size = (
                opened.model.__class__.__name__,
                sum(p.numel() for p in opened.model.parameters()),
            )
            rows.append(
                [
                    path,
                    *size,
                    name,
                    found.users,
                    found.relevant,
                    f"{found.ndcg:.4f}",
                    f"{found.recall:.4f}",
                ]
            )
    names = [
        "checkpoint",
        "model",
        "parameters",
        "items",
        "users",
        "relevant",
        f"NDCG@{NDCG_AT}",
        f"Recall@{RECALL_AT}",
    ]
    print(tabulate(rows, names, tablefmt="github", disable_numparse=True))


def open_checkpoint(path: str, data_path: str | None = None) -> Opened:
    """The same as RecBole's ``load_data_and_model``, but the data path may be another one."""
    content = read_checkpoint(path)
    config = content["config"]
    if data_path is not None:
        config["data_path"] = os.path.join(data_path, config["dataset"])
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train._dataset).to(config["device"])
    model.load_state_dict(content["state_dict"])
    model.load_other_parameter(content.get("other_parameter"))
    model.eval()
    return Opened(model, dataset, train, test)


def coldest_fifth(opened: Opened) -> Tensor:
    """Bool ``[n_items]``: whether an item is in the fifth with the fewest training interactions."""
    field, n_items = opened.dataset.iid_field, int(opened.dataset.item_num)
    known = torch.unique(opened.dataset.inter_feat[field])
    counts = torch.bincount(opened.train._dataset.inter_feat[field], minlength=n_items)[known]
    coldest = known[torch.argsort(counts, stable=True)[: len(known) // 5]]
    return torch.zeros(n_items, dtype=torch.bool).index_fill_(0, coldest, True)


def measure(opened: Opened) -> tuple[Metrics, Metrics]:
    """The metrics with all test items relevant, and with those of the coldest fifth only."""
    cold = coldest_fifth(opened)
    top, relevant = (torch.cat(parts) for parts in zip(*ranked(opened), strict=True))
    return metrics_of(top, relevant), metrics_of(top, relevant & cold)


@torch.no_grad()
def ranked(opened: Opened) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch of test users, their top-K ``[n, K]`` and their relevant items.

    The second is bool ``[n, n_items]``.
    """
    for interaction, history, users, items in opened.test:
        scores = (
            opened.model.full_sort_predict(interaction.to(opened.model.device))
            .view(len(interaction), -1)
            .cpu()
        )
        scores[:, 0] = -torch.inf
        if history is not None:
            scores[history] = -torch.inf
        relevant = torch.zeros(scores.shape, dtype=torch.bool)
        relevant[users, items] = True
        yield scores.topk(max(NDCG_AT, RECALL_AT)).indices, relevant


def metrics_of(top: Tensor, relevant: Tensor) -> Metrics:
    """NDCG and recall as in RecBole: gains are binary, the ideal list has all relevant items."""
    counts = relevant.sum(1)
    used = counts > 0
    counts, hits = counts[used], relevant[used].gather(1, top[used]).double()
    gains = 1 / torch.log2(torch.arange(2, NDCG_AT + 2, dtype=torch.float64))
    ideal = gains.cumsum(0)[counts.clamp(max=NDCG_AT) - 1]
    ndcg = (hits[:, :NDCG_AT] * gains).sum(1) / ideal
    recall = hits[:, :RECALL_AT].sum(1) / counts
    return Metrics(float(ndcg.mean()), float(recall.mean()), int(used.sum()), int(counts.sum()))


if __name__ == "__main__":
    main()
