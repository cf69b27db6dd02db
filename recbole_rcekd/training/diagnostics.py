"""How far a student is from its teacher, measured on the full rows of a few users."""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_rcekd.core.closure import blockers_covered, mean_closure_gaps
from recbole_rcekd.core.functional import (
    is_member,
    ndcg_against,
)
from recbole_rcekd.core.top_k import top_k
from recbole_rcekd.core.types import ItemSets, TeacherScores
from recbole_rcekd.losses.base import KDLoss

# The lengths of the top-K lists. They are the same for all methods, so that histories can be
# compared.
OVERLAP_AT = 50
NDCG_AT = 10


class DiagnosticUsers:
    """A few users (or rows), always the same, to compare with the teacher after every epoch.

    Args:
        n: how many.
        contexts: the users who learn, ``[m]``.
        teacher: the teacher's scores.
        generator: draws the users.

    Attributes:
        places: the positions of the drawn users in the given ``contexts``, ``[n]``.
        contexts: the ids of the drawn users, ``[n]``.
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
            else:  # teacher.top_k would make lists of this length for all users
                self._teacher_top = top_k(teacher.score_all(self.contexts), k)

    def __len__(self) -> int:
        """How many users there are."""
        return len(self.places)

    def distance(self, rows: Tensor) -> dict[str, float]:
        """How far the student is from the teacher (:func:`distance_to_teacher`).

        Args:
            rows: the student's scores of all items for these users, ``[n, n_items]``.
        """
        return distance_to_teacher(rows, self._teacher_top)


def distance_to_teacher(rows: Tensor, teacher_top: Tensor) -> dict[str, float]:
    """How far the student's ranking is from the teacher's.

    Args:
        rows: the student's scores of all items for n users, ``[n, n_items]``.
        teacher_top: the teacher's top-k of these users, ``[n, k]``, k at most 50. A short list ends
            in zeros and is compared up to its end. Users with an empty list are left out.

    Returns:
        ``overlap@50``: the share of the teacher's top-50 that is in the student's top-50.
        ``ndcg@10_to_teacher``: NDCG@10 of the student's top-10 with the teacher's top-10 as truth.
        Empty if all lists are empty.
    """
    k = teacher_top.shape[1]
    covered = (teacher_top != 0).any(1)
    if not covered.any():
        return {}
    teacher_top, student_top = teacher_top[covered], top_k(rows[covered], k)
    listed = teacher_top != 0
    return {
        f"overlap@{k}": float(is_member(teacher_top, student_top)[listed].float().mean()),
        f"ndcg@{NDCG_AT}_to_teacher": float(
            ndcg_against(student_top[:, :NDCG_AT], teacher_top[:, :NDCG_AT]).mean()
        ),
    }


def mean_closure_gap(loss: KDLoss, sets: ItemSets, rows: Tensor) -> float | None:
    """The mean closure gap Δ in nats (METHODS.md, T3); ``None`` if the loss does not have one.

    Args:
        loss: the method.
        sets: what the loss chose for n users.
        rows: the student's scores of all items for the same users, ``[n, n_items]``.
    """
    return closure_metrics(loss, sets, rows).get("closure_gap")


def closure_metrics(loss: KDLoss, sets: ItemSets, rows: Tensor) -> dict[str, float]:
    """How close the candidates of the users are to closure (METHODS.md, T3).

    Args:
        loss: the method.
        sets: what the loss chose for n users.
        rows: the student's scores of all items for the same users, ``[n, n_items]``.

    Returns:
        ``closure_gap``: the mean gap Δ of the targets J with the normaliser A, in nats. If A has
        more items than J, also what the additional items change: ``closure_gap_unsampled``, which
        is Δ with A = J, and ``blockers_covered`` (:func:`blockers_covered`). Empty if the loss has
        no closure gap.
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
