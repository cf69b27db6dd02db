"""How far a student is from its teacher, on a few contexts looked at in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recbole_rcekd.core.closure import blockers_covered, mean_closure_gaps
from recbole_rcekd.core.functional import (
    is_member,
    ndcg_against,
)
from recbole_rcekd.core.top_k import top_k
from recbole_rcekd.core.types import ItemSets, TeacherScores

if TYPE_CHECKING:  # a loss may ask here how well it draws
    from recbole_rcekd.losses.base import KDLoss

# The list lengths: the same for every method, so that histories can be laid side by side.
OVERLAP_AT = 50
NDCG_AT = 10


class DiagnosticUsers:
    """A few contexts that are compared with the teacher in full after every epoch, always the same.

    Args:
        n: how many.
        contexts: those who learn, ``[m]``.
        teacher: the teacher's scores.
        generator: chooses them.

    Attributes:
        places: theirs in ``contexts``, ``[n]``.
        contexts: their ids.
    """

    def __init__(
        self, n: int, contexts: Tensor, teacher: TeacherScores, generator: torch.Generator
    ) -> None:
        n = min(n, len(contexts))
        self.places = torch.randperm(len(contexts), generator=generator, device=contexts.device)[:n]
        self.contexts = contexts[self.places]
        if n:
            k = min(OVERLAP_AT, teacher.n_items - 1)
            if teacher.partial:
                self._teacher_top = teacher.top_k(self.contexts, k, False)
            else:  # not by top_k, which would make lists of this length for everybody
                self._teacher_top = top_k(teacher.score_all(self.contexts), k)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.places)

    def distance(self, rows: Tensor) -> dict[str, float]:
        """How far the student is, by its scores ``rows [n, n_items]`` of these contexts (:func:`distance_to_teacher`)."""
        return distance_to_teacher(rows, self._teacher_top)


def distance_to_teacher(rows: Tensor, teacher_top: Tensor) -> dict[str, float]:
    """``overlap@50``: share of the teacher's top-50 in the student's; ``ndcg@10_to_teacher``: NDCG of the student's
    top-10 with the teacher's as truth.

    Args:
        rows: the student's scores of every item, ``[n, n_items]``.
        teacher_top: the teacher's best items, ``[n, k]``, k at most 50; 0 in short lists, which are
            compared as far as they go. Rows without any are left out; nothing is returned if no row
            has any.
    """  # noqa: D205
    k = teacher_top.shape[1]
    said = (teacher_top != 0).any(1)
    if not said.any():
        return {}
    teacher_top, student_top = teacher_top[said], top_k(rows[said], k)
    listed = teacher_top != 0
    return {
        f"overlap@{k}": float(is_member(teacher_top, student_top)[listed].float().mean()),
        f"ndcg@{NDCG_AT}_to_teacher": float(
            ndcg_against(student_top[:, :NDCG_AT], teacher_top[:, :NDCG_AT]).mean()
        ),
    }


def mean_closure_gap(loss: KDLoss, sets: ItemSets, rows: Tensor) -> float | None:
    """Δ of the item sets, in nats (METHODS.md, T3); ``None`` where the loss has no sets to close.

    Args:
        loss: whose sets they are.
        sets: of n contexts.
        rows: the student's scores of every item for the same contexts, ``[n, n_items]``.
    """
    return closure_metrics(loss, sets, rows).get("closure_gap")


def closure_metrics(loss: KDLoss, sets: ItemSets, rows: Tensor) -> dict[str, float]:
    """How nearly closed the item sets are; nothing where the loss has no sets to close.

    ``closure_gap``: Δ of the targets J in the normaliser A, in nats (METHODS.md, T3). Where A has
    more than J, also what that is good for: ``closure_gap_unsampled``, Δ with A = J, and
    ``blockers_covered`` (:func:`blockers_covered`).

    Args:
        loss: whose sets they are.
        sets: of n contexts.
        rows: the student's scores of every item for the same contexts, ``[n, n_items]``.
    """
    pair = None if loss.scores_all_items else loss.closure_sets(sets)
    if pair is None or pair[0].teacher_scores is None:
        return {}
    targets, support = pair
    if support is targets:
        return {"closure_gap": mean_closure_gaps(targets, [support], rows, loss.temperature)[0]}
    gap, unsampled = mean_closure_gaps(targets, [support, targets], rows, loss.temperature)
    return {
        "closure_gap": gap,
        "closure_gap_unsampled": unsampled,
        "blockers_covered": blockers_covered(targets, support, rows),
    }
