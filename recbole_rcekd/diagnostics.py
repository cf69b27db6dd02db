"""How far a student is from its teacher, on a few contexts looked at in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recbole_rcekd.functional import closure_gap, count_above, is_member, masked_log_softmax, ndcg_against
from recbole_rcekd.ranking import top_k
from recbole_rcekd.types import ItemSets, TeacherScores

if TYPE_CHECKING:  # a loss may ask here how well it draws
    from recbole_rcekd.losses.base import KDLoss

# The list lengths: the same for every method, so that histories can be laid side by side.
OVERLAP_AT = 50
NDCG_AT = 10


class Watched:
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

    def __init__(self, n: int, contexts: Tensor, teacher: TeacherScores, generator: torch.Generator) -> None:
        n = min(n, len(contexts))
        self.places = torch.randperm(len(contexts), generator=generator, device=contexts.device)[:n]
        self.contexts = contexts[self.places]
        if n:
            k = min(OVERLAP_AT, teacher.n_items - 1)
            if getattr(teacher, "partial", False):
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
        teacher_top: the teacher's best items, ``[n, k]``, k at most 50; 0 in short lists, which are compared as far as they
            go. Rows without any are left out; nothing is returned if no row has any.
    """  # noqa: D205
    k = teacher_top.shape[1]
    said = (teacher_top != 0).any(1)
    if not said.any():
        return {}
    teacher_top, student_top = teacher_top[said], top_k(rows[said], k)
    listed = teacher_top != 0
    return {
        f"overlap@{k}": float(is_member(teacher_top, student_top)[listed].float().mean()),
        f"ndcg@{NDCG_AT}_to_teacher": float(ndcg_against(student_top[:, :NDCG_AT], teacher_top[:, :NDCG_AT]).mean()),
    }


def mean_closure_gap(loss: KDLoss, sets: ItemSets, rows: Tensor) -> float | None:
    """Δ of the item sets, in nats (METHODS.md, T3); ``None`` where the loss has no sets to close.

    Args:
        loss: whose sets they are.
        sets: of n contexts.
        rows: the student's scores of every item for the same contexts, ``[n, n_items]``.
    """
    return closure_numbers(loss, sets, rows).get("closure_gap")


def closure_numbers(loss: KDLoss, sets: ItemSets, rows: Tensor) -> dict[str, float]:
    """How nearly closed the item sets are; nothing where the loss has no sets to close.

    ``closure_gap``: Δ of the targets J in the normaliser A, in nats (METHODS.md, T3). Where A has more than J, also what that
    is good for: ``closure_gap_unsampled``, Δ with A = J, and ``blockers_covered`` (:func:`blockers_covered`).

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
        return {"closure_gap": mean_closure_gaps(targets, [support], rows)[0]}
    gap, unsampled = mean_closure_gaps(targets, [support, targets], rows)
    return {
        "closure_gap": gap,
        "closure_gap_unsampled": unsampled,
        "blockers_covered": blockers_covered(targets, support, rows),
    }


def mean_closure_gaps(targets: ItemSets, supports: Sequence[ItemSets], rows: Tensor) -> list[float]:
    """The mean Δ of the targets J in each of several normalisers A, in nats.

    Args:
        targets: J of n contexts, with the teacher's scores.
        supports: several A, J in each.
        rows: the student's scores of every item for the same contexts, ``[n, n_items]``.
    """
    if targets.teacher_scores is None:
        raise ValueError("A closure gap weighs by the teacher's scores, and the targets have none.")
    scores = rows.gather(1, targets.items.long())
    probs = masked_log_softmax(targets.teacher_scores, targets.keep).exp()
    if targets.keep is not None:
        probs = probs.masked_fill(~targets.keep, 0.0)
    above = count_above(scores, rows)
    return [
        float(closure_gap(probs, scores, above, rows.gather(1, support.items.long()), support.keep).mean())
        for support in supports
    ]


def blockers_covered(targets: ItemSets, support: ItemSets, rows: Tensor) -> float:
    """Of all pairs of a target and an item that the student puts above it, the share whose second item is in A.

    Args:
        targets: J of n contexts.
        support: A.
        rows: the student's scores of every item for the same contexts, ``[n, n_items]``.

    Returns:
        From 0 to 1; 1 where nothing is above a target.
    """
    scores, listed = (rows.gather(1, sets.items.long()) for sets in (targets, support))
    if support.keep is not None:
        listed = listed.masked_fill(~support.keep, -torch.inf)
    pairs, covered = count_above(scores, rows), count_above(scores, listed)
    if targets.keep is not None:
        pairs, covered = pairs[targets.keep], covered[targets.keep]
    n_pairs = int(pairs.sum())
    return int(covered.sum()) / n_pairs if n_pairs else 1.0
