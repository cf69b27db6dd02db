"""Compares the full rankings of a student and its teacher: overlap, ranks and closure gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.functional import count_above, ndcg_against, positions_in
from recbole_rcekd.core.top_k import top_k
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.training.diagnostics import NDCG_AT, mean_closure_gap

# The lengths of top-K lists whose overlap is measured, and the positions in the teacher's list
# whose ranks are.
OVERLAPS_AT = (1, 5, 10, 20, 50, 100, 200)
RANKS_OF = (1, 2, 5, 10, 20, 50, 100)


class Comparison:
    """Compares a student with its teacher, over several blocks of users (or rows of sequences).

    Args:
        losses: the losses of whose candidates the closure gap is measured, by name.
        n_items: how many items there are, padding included.

    Attributes:
        n: how many users were compared.
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

    def add(self, candidates: Candidates, rows: Tensor) -> None:
        """Add a block of users.

        Args:
            candidates: the candidates of n users. Users whom the teacher does not cover are left
                out.
            rows: the student's scores of all items for the same users, ``[n, n_items]``, −inf at
                the padding item.
        """
        longest = self._lengths[-1]
        teacher_top = candidates.teacher_top(longest)
        covered = (teacher_top != 0).any(1).nonzero().squeeze(1)
        if len(covered) == 0:
            return
        if len(covered) < len(rows):
            candidates, rows = candidates.part(covered), rows[covered]
            teacher_top = teacher_top[covered]
        student_top = top_k(rows, longest)
        shared, listed = shared_items(student_top, teacher_top, self._lengths)
        self._shared += shared.cpu()
        self._listed += listed.cpu()
        self._ndcg += float(ndcg_against(student_top[:, :NDCG_AT], teacher_top[:, :NDCG_AT]).sum())
        columns = torch.tensor(self._places, device=rows.device) - 1
        self._ranks.append(ranks_of(teacher_top[:, columns], rows).cpu())
        for name, loss in self._losses.items():
            if loss.tuned:
                loss.tune(candidates)
            self._gaps[name] += len(rows) * (
                mean_closure_gap(loss, loss.select(candidates), rows) or 0.0
            )
        self.n += len(rows)

    def metrics(self) -> dict[str, Any]:
        """The results over all users; empty if the teacher covers none of them.

        Returns:
            ``overlap``: by length K, the share of the teacher's top-K that is in the student's.
            ``ndcg@10_to_teacher``: NDCG@10 of the student's top-10 with the teacher's as truth.
            ``rank``: by k, mean and quartiles of the student's rank of the teacher's k-th item; 1
            is the best. ``closure_gap``: by loss, Δ in nats.
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
    """How many items of the teacher's top-K lists are in the student's, for several lengths K.

    Args:
        student_top: the student's top-k, best first, ``[n, k]``.
        teacher_top: the teacher's top-k, best first, ``[n, k]``; short lists end in zeros.
        lengths: the lengths K, at most k each.

    Returns:
        For each length, over all rows: how many items of the teacher's top-K are in the student's,
        and how many items the teacher's top-K lists have; ``[len(lengths)]`` each.
    """
    position = positions_in(teacher_top, student_top).masked_fill(teacher_top == 0, -1)
    shared = [((position[:, :k] >= 0) & (position[:, :k] < k)).sum() for k in lengths]
    listed = [(teacher_top[:, :k] != 0).sum() for k in lengths]
    return torch.stack(shared), torch.stack(listed)


def ranks_of(items: Tensor, rows: Tensor) -> Tensor:
    """The ranks of items by full rows of scores; 1 is the best.

    Args:
        items: the items, ``[n, k]``.
        rows: the scores of all items, ``[n, n_items]``.

    Returns:
        ``[n, k]``, float32; NaN for item 0.
    """
    ranks = 1.0 + count_above(rows.gather(1, items), rows)
    return ranks.masked_fill(items == 0, torch.nan)


def quartile_groups(values: Tensor) -> list[tuple[int, int, Tensor]]:
    """Split values into four groups of about the same size, from small to large values.

    Equal values stay together, so there may be fewer groups.

    Args:
        values: whole numbers, ``[n]``.

    Returns:
        For each group its smallest value, its largest value, and which values are in it, bool
        ``[n]``.
    """
    edges = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    group = torch.bucketize(values.double(), edges)  # an edge belongs to the group below it
    members = [group == g for g in range(4)]
    return [(int(values[m].min()), int(values[m].max()), m) for m in members if m.any()]


def transfer_ratio(
    distilled: float, alone: float, teacher: float, bigger: bool = True
) -> float | None:
    """The share of the teacher's advantage that the student has gained by distillation.

    It is (distilled − alone) / (teacher − alone), or ``None`` if the teacher has no advantage over
    the student alone.

    Args:
        distilled: a metric of the distilled student.
        alone: the same metric of the student alone.
        teacher: the same metric of the teacher.
        bigger: a bigger value of the metric is better.

    Example:
        >>> transfer_ratio(0.25, alone=0.125, teacher=0.375)
        0.5
    """
    gap = teacher - alone
    return (distilled - alone) / gap if (gap > 0 if bigger else gap < 0) else None
