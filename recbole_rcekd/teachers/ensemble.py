r"""Several teachers as one: a mean of their scores on a common scale, or of their ranks.

* ``standardised``: for each user and teacher, the scores of all items are shifted and scaled to
  mean 0 and standard deviation 1, and then averaged with the teachers' weights. If the scores are a
  product of two tables, no full rows are needed for that. With m and C the mean and the covariance
  of the item rows, the mean of :math:`u\cdot v` over items is :math:`u\cdot m` and its variance is
  :math:`u^\top C u`, so

  .. math:: \frac{u\cdot v - u\cdot m}{\sigma_u} = \frac{u}{\sigma_u} \cdot (v - m)

  and the average is again a product of two tables, which are wider. For score files, mean and
  deviation have a closed form too; unlisted items have the floor as their score.
* ``reciprocal_rank``: :math:`\sum_k w_k / (60 + \text{rank}_k)` over the teachers' top-K lists; a
  list adds 0 for an item that is not in it. Source: Cormack, Clarke, Büttcher, Reciprocal Rank
  Fusion, SIGIR 2009. Such scores are small (at most 1/61 for one teacher of weight 1), so they suit
  losses that only use the order (RRD).

In the standardised mean, a teacher that gives all items the same score adds 0 for that user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.core.store import Store
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.listed_scores import ListedScores
from recbole_rcekd.teachers.rescale import SMALLEST_DEVIATION, moments, moved, scale_to
from recbole_rcekd.teachers.score_tables import FactorScores, Scores, blocks, centred

# Cormack et al. 2009: "k = 60 was fixed during a pilot investigation".
_RANK_OFFSET = 60
# The length of the top-K lists whose ranks are combined.
_RANKED = 1000


def ensemble(
    parts: Sequence[TeacherScores],
    weights: Sequence[float],
    how: Literal["standardised", "reciprocal_rank"],
    seen: Seen,
    store: Store | None = None,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    of_rows: bool = False,
) -> TeacherScores:
    """The scores of several teachers, combined.

    Args:
        parts: the scores of each teacher, all in the student's ids.
        weights: the weight of each teacher, at least 0; teachers of weight 0 are not used.
        how: the key ``teacher_ensemble``.
        seen: the training interactions.
        store: where the top-K lists of the result are kept. Its name should depend on all teachers
            and their weights.
        ranks: this process among those that need the scores.
        device: the device of the student; ``reciprocal_rank`` keeps its scores there.
        of_rows: the scores are for rows of sequences, numbered from 0, not for users, where 0 is
            padding.

    Returns:
        For ``standardised``: :class:`FactorScores` or :class:`ListedScores` if all parts are of
        that class, and otherwise :class:`EnsembleScores`. For ``reciprocal_rank``:
        :class:`ListedScores`.
    """
    counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    some, their = [part for part, _ in counted], [weight for _, weight in counted]
    if how == "reciprocal_rank":
        return reciprocal_rank(some, their, seen, ranks=ranks, device=device, of_rows=of_rows)
    return standardised(some, their, seen, store, ranks)


class TeacherEnsemble(Teacher):
    """Several teachers of one student, combined into one.

    Args:
        parts: the teachers.
        weights: the weight of each teacher.
        settings: ``teacher_ensemble`` says how they are combined.

    Raises:
        TeacherError: some teachers score the rows of a sequential student, and some its users.
    """

    def __init__(
        self, parts: Sequence[Teacher], weights: Sequence[float], settings: TeacherSettings
    ) -> None:
        if len({part.scores_rows for part in parts}) > 1:
            told = ", ".join(
                f"[{part.source}] {'rows' if part.scores_rows else 'users'}" for part in parts
            )
            raise TeacherError(
                "Several teachers of a sequential student must all score its sequences, or all its "
                f"users; here: {told}. Take sequential ones only, or none."
            )
        name, source = (" + ".join(p.name for p in parts), ",".join(p.source for p in parts))
        super().__init__(parts[0].student_dataset, name, source)
        self._parts, self.weights = parts, weights
        self.how = settings.teacher_ensemble
        self.scores_rows = parts[0].scores_rows
        self.scores_users = all(part.scores_users for part in parts)

    @property
    def parts(self) -> Sequence[Teacher]:
        """The teachers of the ensemble."""
        return self._parts

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the teachers, their weights and how they are combined."""
        made_by = ([part.fingerprint for part in self.parts], list(self.weights), self.how)
        return hashlib.sha256(repr(made_by).encode()).hexdigest()[:32]

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        return self.scores_and_listed(contexts)[0]

    def score_rows(self, rows: Any) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        # Reciprocal ranks use listed items only.
        only_listed = self.how == "reciprocal_rank"
        scores = [p.listed_rows(rows) if only_listed else p.score_rows(rows) for p in self.parts]
        return combined_rows(scores, self.weights, self.how)

    def scores_and_listed(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        pairs = zip(self.parts, self.weights, strict=True)
        counted = [(part, weight) for part, weight in pairs if weight > 0]
        parts = [part.scores_and_listed(contexts) for part, _ in counted]
        ranks = self.how == "reciprocal_rank"
        weights = [weight for _, weight in counted]
        rows = combined_rows([part[ranks] for part in parts], weights, self.how)
        some = torch.stack([part[1] != -torch.inf for part in parts]).any(0)
        listed = rows > 0 if ranks else some
        rows = rows.masked_fill(~some.any(1, keepdim=True), -torch.inf)
        return rows, rows.masked_fill(~listed, -torch.inf)

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """The scores of all teachers, combined; each teacher keeps its own on disk."""
        parts = [part.open_scores(settings, show_progress, ranks) for part in self.parts]
        store = Store(Path(settings.kd_cache_dir) / self.fingerprint)
        # A rank needs the top-K lists of its own users; with a sequential student, of any row.
        owners = None if self.for_rows else ranks
        return ensemble(
            parts, self.weights, self.how, self.seen, store, owners, self.device, self.scores_rows
        )

    def scorers(self) -> list[ModelScorer]:
        """The scorers of all teachers' models."""
        return [scorer for part in self.parts for scorer in part.scorers()]


class EnsembleScores(Scores):
    """A sum of the scores of several teachers, each shifted and scaled for each user.

    It needs the memory of the teachers' scores, and two numbers per user and teacher.

    Args:
        parts: for each teacher its scores, a shift μ and a scale a, both ``[n_contexts]``. The
            teacher adds (score − μ)·a, and 0 where a is 0.
        seen: the training interactions, for top-K lists of unseen items.
        store: where top-K lists are kept between runs; ``None``: in memory only.
        side: the name of the users' side in the store.
        ranks: this process among those that share the work of the top-K lists.
        by_item: shifts and scales belong to the items, ``[n_items]``, as after :meth:`transposed`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[TeacherScores, Tensor, Tensor]],
        seen: Seen,
        store: Store | None = None,
        side: str = "users",
        ranks: Ranks | None = None,
        by_item: bool = False,
    ) -> None:
        super().__init__(
            parts[0][0].n_contexts, parts[0][0].n_items, seen, store, side, ranks or Ranks()
        )
        self._parts = parts
        self._by_item = by_item

    @property
    def _rounded(self) -> str:
        return "".join(part._rounded for part, _, _ in self._parts if isinstance(part, Scores))

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        index = items if self._by_item else contexts.unsqueeze(1)
        terms = (
            moved(part.score(contexts, items), shift[index], scale[index])
            for part, shift, scale in self._parts
        )
        return _sum(terms)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        index = slice(None) if self._by_item else contexts.unsqueeze(1)
        terms = (
            moved(part.score_all(contexts), shift[index], scale[index])
            for part, shift, scale in self._parts
        )
        scores = _sum(terms)
        scores[:, 0] = -torch.inf
        return scores

    def transposed(self) -> EnsembleScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; the scores stay the same."""
        parts = [(part.transposed(), shift, scale) for part, shift, scale in self._parts]
        side = f"by-{self._side}"
        return EnsembleScores(
            parts, self._seen.transposed(), self._store, side, self._ranks, not self._by_item
        )


def standardised(
    parts: Sequence[TeacherScores],
    weights: Sequence[float],
    seen: Seen,
    store: Store | None = None,
    ranks: Ranks | None = None,
) -> FactorScores | ListedScores | EnsembleScores:
    """The weighted mean of standardised scores; see the head of this file and :func:`ensemble`.

    Args:
        parts: the scores of each teacher.
        weights: the weight of each teacher, above 0.
        seen: the training interactions.
        store: where the top-K lists of the result are kept.
        ranks: this process among those that need the scores.
    """
    shares = [weight / sum(weights) for weight in weights]
    tables = [
        (part, share)
        for part, share in zip(parts, shares, strict=True)
        if isinstance(part, FactorScores)
    ]
    lists = [
        (part, share)
        for part, share in zip(parts, shares, strict=True)
        if isinstance(part, ListedScores)
    ]
    if len(lists) == len(parts):
        return _mean_of_lists(lists, seen)
    merged = _mean_of_tables(tables, seen, store, ranks) if tables else None
    if merged is not None and len(tables) == len(parts):
        return merged
    standard: list[tuple[TeacherScores, Tensor, Tensor]] = []
    if merged is not None:
        ones = torch.ones(merged.n_contexts, device=merged.context_factors.device)
        standard.append((merged, torch.zeros_like(ones), ones))
    for part, share in zip(parts, shares, strict=True):
        if not isinstance(part, FactorScores):
            mean, deviation = moments(part)
            standard.append((part, mean.float(), scale_to(deviation, share).float()))
    return EnsembleScores(standard, seen, store, ranks=ranks)


def reciprocal_rank(
    parts: Sequence[TeacherScores],
    weights: Sequence[float],
    seen: Seen,
    longest: int = _RANKED,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    of_rows: bool = False,
) -> ListedScores:
    """Reciprocal rank fusion of the teachers' top-K lists, with the training items in them.

    An item that no list of a user has scores 0. A user whom no teacher covers has no list.

    Args:
        parts: the scores of each teacher.
        weights: the weight of each teacher.
        seen: the training interactions.
        longest: the length K of the lists.
        ranks: this process among those that need the scores.
        device: where the result is kept.
        of_rows: the scores are for rows of sequences, numbered from 0, not for users.
    """
    ranks = ranks or Ranks()
    n_contexts, n_items = len(seen.starts) - 1, seen.n_ids
    k = min(longest, n_items - 1)
    reward = 1.0 / (_RANK_OFFSET + torch.arange(1, k + 1, dtype=torch.float64, device=device))
    keys, scores = [], []
    for block in blocks(n_contexts, k * len(parts)):
        contexts = ranks.own(block if of_rows else block[block > 0]).to(device)
        # One teacher after the other: all ranks must ask for top-K lists in the same order.
        items = torch.cat([part.top_k(contexts, k, False) for part in parts], dim=1)
        given = torch.cat([weight * reward for weight in weights]).expand(items.shape)
        rows = contexts.unsqueeze(1).expand(items.shape)
        key, score = _added_up(rows[items > 0] * n_items + items[items > 0], given[items > 0])
        keys.append(key)
        scores.append(score)
    # Each rank has some of the users; the item side needs all of them.
    every = ranks.gather((torch.cat(keys).cpu(), torch.cat(scores).float().cpu()))
    key, score = (torch.cat([pair[i] for pair in every]).to(device) for i in (0, 1))
    return ListedScores(
        key // n_items, key % n_items, score, torch.zeros(n_contexts, device=device), seen
    )


def combined_rows(
    rows: Sequence[Tensor],
    weights: Sequence[float],
    how: Literal["standardised", "reciprocal_rank"],
) -> Tensor:
    """The full rows of scores of several teachers, combined as by :func:`ensemble`.

    Args:
        rows: the scores of all items by each teacher, ``[n, n_items]`` each, for any n users or
            rows. The column of the padding item is not used.
        weights: the weight of each teacher.
        how: the key ``teacher_ensemble``.

    Returns:
        ``[n, n_items]``.
    """
    total = torch.zeros_like(rows[0])
    for part, weight in zip(rows, weights, strict=True):
        scores = part[:, 1:].double()
        if how == "reciprocal_rank":
            # Equal scores are ranked by ascending id, as in ListedScores.
            best, items = (
                each[:, :_RANKED] for each in scores.sort(dim=1, descending=True, stable=True)
            )
            reward = weight / (
                _RANK_OFFSET + torch.arange(1, best.shape[1] + 1, device=part.device)
            )
            total[:, 1:].scatter_add_(
                1, items, reward.masked_fill(best == -torch.inf, 0.0).to(total.dtype)
            )
        else:
            mean, deviation = (
                scores.mean(1, keepdim=True),
                scores.std(1, correction=0, keepdim=True),
            )
            deviation = deviation.nan_to_num(0.0).masked_fill(
                deviation <= SMALLEST_DEVIATION * mean.abs(), 0.0
            )
            total[:, 1:] += moved(scores, mean, scale_to(deviation, weight / sum(weights))).to(
                total.dtype
            )
    total[:, 0] = -torch.inf
    return total


def _mean_of_tables(
    parts: Sequence[tuple[FactorScores, float]],
    seen: Seen,
    store: Store | None,
    ranks: Ranks | None,
) -> FactorScores:
    rows, tables = [], []
    for part, share in parts:
        _, deviation = moments(part)
        rows.append(
            (part.context_factors.double() * scale_to(deviation, share).unsqueeze(1)).float()
        )
        tables.append(centred(part.item_factors)[1].float())
    return FactorScores(torch.cat(rows, dim=1), torch.cat(tables, dim=1), seen, store, ranks=ranks)


def _mean_of_lists(parts: Sequence[tuple[ListedScores, float]], seen: Seen) -> ListedScores:
    """The standardised mean of listed scores, which lists all items that any part lists.

    The floor is the mean of the parts' floors. A listed score of a part adds its distance from the
    part's own floor.
    """
    n_items = parts[0][0].n_items
    keys, above, floor = [], [], torch.zeros_like(parts[0][0].floor(), dtype=torch.float64)
    for part, share in parts:
        mean, deviation = moments(part)
        scale = scale_to(deviation, share)
        floor += moved(part.floor().double(), mean, scale)
        contexts, items, scores = part.rows()
        keys.append(contexts * n_items + items)
        above.append(moved(scores.double(), part.floor().double()[contexts], scale[contexts]))
    key, total = _added_up(torch.cat(keys), torch.cat(above))
    contexts = key // n_items
    return ListedScores(contexts, key % n_items, floor[contexts] + total, floor, seen)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total


def _added_up(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys, ascending, and the sum of the values of each."""
    distinct, index = torch.unique(keys, return_inverse=True)
    return distinct, values.new_zeros(len(distinct)).index_add_(0, index, values)
