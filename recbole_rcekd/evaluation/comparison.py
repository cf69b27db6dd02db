"""A student and its teacher compared in full: overlap, ranks, closure gaps, groups of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.functional import count_above, ndcg_against, places
from recbole_rcekd.core.top_k import top_k
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.training.diagnostics import NDCG_AT, mean_closure_gap

# What an analysis lays side by side: lengths of lists, and places in the teacher's.
OVERLAPS_AT = (1, 5, 10, 20, 50, 100, 200)


RANKS_OF = (1, 2, 5, 10, 20, 50, 100)


class Comparison:
    """A student and its teacher in full, gathered over blocks of contexts.

    Args:
        losses: whose item sets the closure gap is measured of, by name.
        n_items: padding included.
    """

    def __init__(self, losses: Mapping[str, KDLoss], n_items: int) -> None:
        self._losses = losses
        self._lengths = [k for k in OVERLAPS_AT if k < n_items]
        self._places = [k for k in RANKS_OF if k < n_items]
        self._shared = torch.zeros(len(self._lengths), dtype=torch.float64)
        self._listed = torch.zeros(len(self._lengths), dtype=torch.float64)
        self._ndcg = 0.0
        self._gaps = dict.fromkeys(losses, 0.0)
        self._ranks: list[Tensor] = []
        self.n = 0

    def add(self, lists: Candidates, rows: Tensor) -> None:
        """Take in a block.

        Args:
            lists: of n contexts. Those of whom the teacher says nothing are left out.
            rows: the student's scores of every item for the same contexts, ``[n, n_items]``, −inf
                at the padding item.
        """
        longest = self._lengths[-1]
        teacher_top = lists.teacher_top(longest)
        said = (teacher_top != 0).any(1).nonzero().squeeze(1)
        if len(said) == 0:
            return
        if len(said) < len(rows):
            lists, rows, teacher_top = lists.part(said), rows[said], teacher_top[said]
        student_top = top_k(rows, longest)
        shared, listed = shared_items(student_top, teacher_top, self._lengths)
        self._shared += shared.cpu()
        self._listed += listed.cpu()
        self._ndcg += float(ndcg_against(student_top[:, :NDCG_AT], teacher_top[:, :NDCG_AT]).sum())
        columns = torch.tensor(self._places, device=rows.device) - 1
        self._ranks.append(ranks_of(teacher_top[:, columns], rows).cpu())
        for name, loss in self._losses.items():
            if loss.tuned:
                loss.tune(lists)
            self._gaps[name] += len(rows) * (
                mean_closure_gap(loss, loss.select(lists), rows) or 0.0
            )
        self.n += len(rows)

    def metrics(self) -> dict[str, Any]:
        """What was found, with plain numbers; empty if the teacher said nothing of anybody.

        ``overlap``: by length K, the share of the teacher's top-K in the student's.
        ``ndcg@10_to_teacher``: NDCG of the student's top-10 with the teacher's as truth. ``rank``:
        by k, mean and quartiles of the student's rank of the teacher's k-th item, 1 the best.
        ``closure_gap``: by loss, Δ in nats.
        """
        if self.n == 0:
            return {}
        ranks = torch.cat(self._ranks)
        return {
            "overlap": {
                k: float(s / n)
                for k, s, n in zip(self._lengths, self._shared, self._listed, strict=True)
            },
            f"ndcg@{NDCG_AT}_to_teacher": self._ndcg / self.n,
            "rank": {
                k: _spread(ranks[:, i])
                for i, k in enumerate(self._places)
                if not ranks[:, i].isnan().all()
            },
            "closure_gap": {name: total / self.n for name, total in self._gaps.items()},
        }


def _spread(values: Tensor) -> dict[str, float]:
    values = values[~values.isnan()].double()
    quartiles = dict(zip(("q1", "median", "q3"), (0.25, 0.5, 0.75), strict=True))
    return {
        "mean": float(values.mean()),
        **{name: float(values.quantile(q)) for name, q in quartiles.items()},
    }


def shared_items(
    student_top: Tensor, teacher_top: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """For each length K: how many of the teacher's top-K are in the student's, and how many the teacher lists, over all rows.

    Args:
        student_top: the student's best items, best first, ``[n, k]``.
        teacher_top: the teacher's, ``[n, k]``; 0 in short lists.
        lengths: at most k each.

    Returns:
        ``[len(lengths)]`` each.
    """
    place = places(teacher_top, student_top).masked_fill(teacher_top == 0, -1)
    shared = [((place[:, :k] >= 0) & (place[:, :k] < k)).sum() for k in lengths]
    listed = [(teacher_top[:, :k] != 0).sum() for k in lengths]
    return torch.stack(shared), torch.stack(listed)


def ranks_of(items: Tensor, rows: Tensor) -> Tensor:
    """The rank of ``items [n, k]`` by full scores ``rows [n, n_items]``, 1 the best; NaN for item 0. ``[n, k]``, float32."""
    ranks = 1.0 + count_above(rows.gather(1, items), rows)
    return ranks.masked_fill(items == 0, torch.nan)


def quartile_groups(values: Tensor) -> list[tuple[int, int, Tensor]]:
    """Four groups of about the same size, by value; fewer where many values are equal, which stay together.

    Args:
        values: whole numbers, ``[n]``.

    Returns:
        For each group its smallest and its largest value, and who is in it, bool ``[n]``.
    """
    edges = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    group = torch.bucketize(values.double(), edges)  # an edge belongs to the group below it
    members = [group == g for g in range(4)]
    return [(int(values[m].min()), int(values[m].max()), m) for m in members if m.any()]


def transfer_ratio(
    distilled: float, alone: float, teacher: float, bigger: bool = True
) -> float | None:
    """(distilled − alone) / (teacher − alone): the share of the teacher's advantage that arrived; ``None`` if it has none.

    Args:
        distilled: a metric of the distilled student.
        alone: of the student alone.
        teacher: of the teacher.
        bigger: whether more of it is better.

    >>> transfer_ratio(0.25, alone=0.125, teacher=0.375)
    0.5
    """
    gap = teacher - alone
    return (distilled - alone) / gap if (gap > 0 if bigger else gap < 0) else None
