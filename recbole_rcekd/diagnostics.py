"""How far a student is from its teacher, on a few contexts looked at in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_rcekd.functional import closure_gap, count_above, is_member, masked_log_softmax, ndcg_against, places
from recbole_rcekd.item_sets import Lists
from recbole_rcekd.ranking import top_k
from recbole_rcekd.types import ItemSets, TeacherScores

if TYPE_CHECKING:  # a loss may ask here how well it draws
    from recbole_rcekd.losses.base import KDLoss

# The list lengths: the same for every method, so that histories can be laid side by side.
OVERLAP_AT = 50
NDCG_AT = 10
# What an analysis lays side by side: lengths of lists, and places in the teacher's.
OVERLAPS_AT = (1, 5, 10, 20, 50, 100, 200)
RANKS_OF = (1, 2, 5, 10, 20, 50, 100)


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
        return {"closure_gap": mean_closure_gaps(targets, [support], rows, loss.temperature)[0]}
    gap, unsampled = mean_closure_gaps(targets, [support, targets], rows, loss.temperature)
    return {
        "closure_gap": gap,
        "closure_gap_unsampled": unsampled,
        "blockers_covered": blockers_covered(targets, support, rows),
    }


def mean_closure_gaps(
    targets: ItemSets, supports: Sequence[ItemSets], rows: Tensor, temperature: float = 1.0
) -> list[float]:
    """The mean Δ of the targets J in each of several normalisers A, in nats, over the contexts that the teacher speaks of.

    Args:
        targets: J of n contexts, with the teacher's scores.
        supports: several A, J in each.
        rows: the student's scores of every item for the same contexts, ``[n, n_items]``.
        temperature: τ of both sides' softmax.
    """
    if targets.teacher_scores is None:
        raise ValueError("A closure gap weighs by the teacher's scores, and the targets have none.")
    taught = (targets.items != 0).any(1)
    scores = rows.gather(1, targets.items.long())
    probs = masked_log_softmax(targets.teacher_scores / temperature, targets.keep).exp()
    if targets.keep is not None:
        probs = probs.masked_fill(~targets.keep, 0.0)
    above = count_above(scores, rows)

    def gaps(support: ItemSets) -> Tensor:
        listed = rows.gather(1, support.items.long()) / temperature
        return closure_gap(probs, scores / temperature, above, listed, support.keep)

    return [float(gaps(support)[taught].sum() / max(1, int(taught.sum()))) for support in supports]


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

    def add(self, lists: Lists, rows: Tensor) -> None:
        """Take in a block.

        Args:
            lists: of n contexts. Those of whom the teacher says nothing are left out.
            rows: the student's scores of every item for the same contexts, ``[n, n_items]``, −inf at the padding item.
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
            self._gaps[name] += len(rows) * (mean_closure_gap(loss, loss.select(lists), rows) or 0.0)
        self.n += len(rows)

    def numbers(self) -> dict[str, Any]:
        """What was found, with plain numbers; empty if the teacher said nothing of anybody.

        ``overlap``: by length K, the share of the teacher's top-K in the student's. ``ndcg@10_to_teacher``: NDCG of the
        student's top-10 with the teacher's as truth. ``rank``: by k, mean and quartiles of the student's rank of the
        teacher's k-th item, 1 the best. ``closure_gap``: by loss, Δ in nats.
        """
        if self.n == 0:
            return {}
        ranks = torch.cat(self._ranks)
        return {
            "overlap": {k: float(s / n) for k, s, n in zip(self._lengths, self._shared, self._listed, strict=True)},
            f"ndcg@{NDCG_AT}_to_teacher": self._ndcg / self.n,
            "rank": {k: _spread(ranks[:, i]) for i, k in enumerate(self._places) if not ranks[:, i].isnan().all()},
            "closure_gap": {name: total / self.n for name, total in self._gaps.items()},
        }


def _spread(values: Tensor) -> dict[str, float]:
    values = values[~values.isnan()].double()
    quartiles = dict(zip(("q1", "median", "q3"), (0.25, 0.5, 0.75), strict=True))
    return {"mean": float(values.mean()), **{name: float(values.quantile(q)) for name, q in quartiles.items()}}


def shared_items(student_top: Tensor, teacher_top: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
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


def transfer_ratio(distilled: float, alone: float, teacher: float, bigger: bool = True) -> float | None:
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
