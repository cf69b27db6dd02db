r"""Several teachers as one: their scores averaged on a common scale, or their ranks.

* ``standardised``: for each user and teacher, scores over the whole catalogue are brought to mean 0
  and standard deviation 1, and then averaged with the teachers' weights. Two tables need no full
  rows for that: with m and C the mean and the covariance of the item rows, the mean of
  :math:`u\cdot v` over items is :math:`u\cdot m` and its variance
  :math:`u^\top C u`, so that

  .. math:: \frac{u\cdot v - u\cdot m}{\sigma_u} = \frac{u}{\sigma_u} \cdot (v - m)

  and an average of tables is two wider tables. Score files have their mean and deviation in closed
  form too, unlisted items counted with the floor.
* ``reciprocal_rank``: :math:`\sum_k w_k / (60 + \text{rank}_k)` over the teachers' best lists, 0
  for what a list lacks. Source: Cormack, Clarke, Büttcher, Reciprocal Rank Fusion, SIGIR 2009. Such
  scores are small (1/61 at most for one teacher of weight 1): losses that look at the order alone
  (RRD) suit them.

In a standardised mean, a teacher that gives all items one score says nothing of that user, and adds
0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.store import Store
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.teachers.score_cache import FactorScores, Scores, blocks
from recbole_rcekd.teachers.score_file import ListedScores

# Cormack et al. 2009: "k = 60 was fixed during a pilot investigation".
_RANK_OFFSET = 60
_RANKED = 1000
# Scores that differ by less, relative to their size, are one number in float32.
_SMALLEST_DEVIATION = 1e-7


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
    """Several teachers as one.

    Args:
        parts: the teachers' scores, all in the student's ids.
        weights: of each part, at least 0; parts of weight 0 are not looked at.
        how: ``teacher_ensemble``.
        seen: the training interactions.
        store: where best-of lists of the result are kept; its name should say what made all parts,
            and the weights.
        ranks: this process among those that need the scores.
        device: where the student is, and where ``reciprocal_rank`` keeps its lists.
        of_rows: contexts are rows of sequences, from 0; users begin with padding.

    Returns:
        For ``standardised`` two tables if all parts are tables, lists if all parts are lists, and
        otherwise
        :class:`EnsembleScores`; for ``reciprocal_rank`` lists.
    """
    counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    some, their = [part for part, _ in counted], [weight for _, weight in counted]
    if how == "reciprocal_rank":
        return reciprocal_rank(some, their, seen, ranks=ranks, device=device, of_rows=of_rows)
    return standardised(some, their, seen, store, ranks)


class EnsembleScores(Scores):
    """A sum of teachers' scores, each moved and scaled per user; memory of the teachers, and two numbers per user.

    Args:
        parts: for each teacher its scores, a shift μ and a scale a, both ``[n_contexts]``: it adds
            (score − μ)·a, and 0 where a is 0.
        seen: the training interactions, for lists of unseen items.
        store: where lists are kept between runs; ``None``: in memory only.
        side: names the contexts in the store.
        ranks: this process among those that share the lists out.
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
        place = items if self._by_item else contexts.unsqueeze(1)
        terms = (
            _moved(part.score(contexts, items), shift[place], scale[place])
            for part, shift, scale in self._parts
        )
        return _sum(terms)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        place = slice(None) if self._by_item else contexts.unsqueeze(1)
        terms = (
            _moved(part.score_all(contexts), shift[place], scale[place])
            for part, shift, scale in self._parts
        )
        scores = _sum(terms)
        scores[:, 0] = -torch.inf
        return scores

    def transposed(self) -> EnsembleScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; users are on the same scale as before."""
        parts = [(part.transposed(), shift, scale) for part, shift, scale in self._parts]
        side = f"by-{self._side}"
        return EnsembleScores(
            parts, self._seen.transposed(), self._store, side, self._ranks, not self._by_item
        )


class RescaledScores:
    """A teacher's scores, moved and scaled per context: (score − μ)·a, and −inf as before. Its lists are the teacher's own.

    Also :meth:`transposed`, where μ and a belong to what is listed and would move ranks.

    Args:
        scores: of the teacher.
        shift: μ, ``[n_contexts]``.
        scale: a, above 0, or 0 for contexts whose scores are all the same, ``[n_contexts]``.
        by_item: shifts and scales belong to the items, as after :meth:`transposed`.
    """

    def __init__(
        self, scores: TeacherScores, shift: Tensor, scale: Tensor, by_item: bool = False
    ) -> None:
        self.n_contexts, self.n_items = scores.n_contexts, scores.n_items
        self.partial = getattr(scores, "partial", False)
        self._scores, self._shift, self._scale, self._by_item = scores, shift, scale, by_item

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._rescaled(
            self._scores.score(contexts, items),
            items.long() if self._by_item else contexts[:, None],
        )

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._rescaled(
            self._scores.score_all(contexts), slice(None) if self._by_item else contexts[:, None]
        )

    def _rescaled(self, scores: Tensor, place: Tensor | slice) -> Tensor:
        moved = _moved(scores, self._shift[place], self._scale[place])
        return moved.masked_fill(scores == -torch.inf, -torch.inf)

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._scores.top_k(contexts, k, unseen)

    def transposed(self) -> RescaledScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; contexts are on the same scale as before."""
        return RescaledScores(
            self._scores.transposed(), self._shift, self._scale, not self._by_item
        )


def standardised(
    parts: Sequence[TeacherScores],
    weights: Sequence[float],
    seen: Seen,
    store: Store | None = None,
    ranks: Ranks | None = None,
) -> FactorScores | ListedScores | EnsembleScores:
    """The weighted mean of standardised scores; see the head of this file and :func:`ensemble`."""
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
    moved: list[tuple[TeacherScores, Tensor, Tensor]] = []
    if merged is not None:
        ones = torch.ones(merged.n_contexts, device=merged.context_factors.device)
        moved.append((merged, torch.zeros_like(ones), ones))
    for part, share in zip(parts, shares, strict=True):
        if not isinstance(part, FactorScores):
            mean, deviation = moments(part)
            moved.append((part, mean.float(), _scale(deviation, share).float()))
    return EnsembleScores(moved, seen, store, ranks=ranks)


def reciprocal_rank(
    parts: Sequence[TeacherScores],
    weights: Sequence[float],
    seen: Seen,
    longest: int = _RANKED,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    of_rows: bool = False,
) -> ListedScores:
    """Reciprocal rank fusion of the parts' best ``longest`` items, training items included.

    What no list of a user has scores 0; a user of whom no part says anything has no list.
    """
    ranks = ranks or Ranks()
    n_contexts, n_items = len(seen.starts) - 1, seen.n_ids
    k = min(longest, n_items - 1)
    reward = 1.0 / (_RANK_OFFSET + torch.arange(1, k + 1, dtype=torch.float64, device=device))
    keys, scores = [], []
    for block in blocks(n_contexts, k * len(parts)):
        contexts = ranks.own(block if of_rows else block[block > 0]).to(device)
        # Part after part, as all ranks must ask for lists in the same order.
        items = torch.cat([part.top_k(contexts, k, False) for part in parts], dim=1)
        given = torch.cat([weight * reward for weight in weights]).expand(items.shape)
        rows = contexts.unsqueeze(1).expand(items.shape)
        key, score = _added_up(rows[items > 0] * n_items + items[items > 0], given[items > 0])
        keys.append(key)
        scores.append(score)
    # Each rank owns some of the users; the item side needs all of them.
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
    """Several teachers' full rows of scores as one, ``[n, n_items]``: what :func:`ensemble` says, of any contexts.

    Args:
        rows: of each teacher, ``[n, n_items]``; the padding item's column is not looked at.
        weights: of each.
        how: ``teacher_ensemble``.
    """
    total = torch.zeros_like(rows[0])
    for part, weight in zip(rows, weights, strict=True):
        scores = part[:, 1:].double()
        if how == "reciprocal_rank":
            # Equal scores by ascending id, as score files list them.
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
                deviation <= _SMALLEST_DEVIATION * mean.abs(), 0.0
            )
            total[:, 1:] += _moved(scores, mean, _scale(deviation, weight / sum(weights))).to(
                total.dtype
            )
    total[:, 0] = -torch.inf
    return total


def rescaled(
    scores: TeacherScores,
    how: Literal["raw", "standardised"],
    temperature: float,
    device: torch.device | str = "cpu",
) -> TeacherScores:
    """The same ranking on another scale: standardised per context or not, then divided by ``temperature``.

    Args:
        scores: of the teacher.
        how: ``kd_teacher_scores``.
        temperature: ``kd_teacher_temperature``.
        device: where the scores are.
    """
    if how == "standardised":
        mean, deviation = moments(scores, device)
        scale = _scale(deviation, 1.0 / temperature).float()
    elif temperature == 1.0:
        return scores
    else:
        mean = torch.zeros(scores.n_contexts, device=device)
        scale = torch.full_like(mean, 1.0 / temperature)
    return RescaledScores(scores, mean.float(), scale)


def moments(part: TeacherScores, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each context's scores over the whole catalogue, ``[n_contexts]``, float64.

    The deviation is 0 where the scores are all one number, as far as float32 can tell, or where
    there are none (the mean is then −inf).
    """
    if isinstance(part, FactorScores):
        mean_row, centred = _centred(part.item_factors)
        rows = part.context_factors.double()
        covariance = centred[1:].t() @ centred[1:] / (part.n_items - 1)
        mean, variance = rows @ mean_row, ((rows @ covariance) * rows).sum(1).clamp(min=0.0)
        # How large the terms are that may cancel.
        size = rows.norm(dim=1) * part.item_factors[1:].double().square().sum(1).mean().sqrt()
    elif isinstance(part, ListedScores):
        mean, variance = _moments_of_lists(part)
        size = mean.abs()
    else:
        found = []
        for block in blocks(part.n_contexts, part.n_items):
            scores = part.score_all(block.to(device))[:, 1:].double()
            found.append(torch.stack([scores.mean(1), scores.var(1, correction=0)]))
        mean, variance = torch.cat(found, dim=1)
        size = mean.abs()
    deviation = variance.sqrt().nan_to_num(0.0)
    return mean, deviation.masked_fill(deviation <= _SMALLEST_DEVIATION * size, 0.0)


def _moments_of_lists(part: ListedScores) -> tuple[Tensor, Tensor]:
    """Above the floor there are only the listed scores."""
    contexts, _, scores = part.rows()
    floor = part.floor().double()
    above = scores.double() - floor[contexts]
    n, zeros = part.n_items - 1, torch.zeros_like(floor)
    mean = zeros.index_add(0, contexts, above) / n
    listed = zeros.index_add(0, contexts, (above - mean[contexts]) ** 2)
    unlisted = (n - torch.bincount(contexts, minlength=part.n_contexts)) * mean**2
    return floor + mean, (listed + unlisted) / n


def _mean_of_tables(
    parts: Sequence[tuple[FactorScores, float]],
    seen: Seen,
    store: Store | None,
    ranks: Ranks | None,
) -> FactorScores:
    rows, tables = [], []
    for part, share in parts:
        _, deviation = moments(part)
        rows.append((part.context_factors.double() * _scale(deviation, share).unsqueeze(1)).float())
        tables.append(_centred(part.item_factors)[1].float())
    return FactorScores(torch.cat(rows, dim=1), torch.cat(tables, dim=1), seen, store, ranks=ranks)


def _centred(table: Tensor) -> tuple[Tensor, Tensor]:
    """The mean row, and the table less it, in float64; padding counts nowhere and becomes 0."""
    exact = table.double()
    mean = exact[1:].mean(0)
    centred = exact - mean
    centred[0] = 0.0
    return mean, centred


def _mean_of_lists(parts: Sequence[tuple[ListedScores, float]], seen: Seen) -> ListedScores:
    """What any part lists; the floor is the mean of the parts' floors, and each part adds what lies above its own."""
    n_items = parts[0][0].n_items
    keys, above, floor = [], [], torch.zeros_like(parts[0][0].floor(), dtype=torch.float64)
    for part, share in parts:
        mean, deviation = moments(part)
        scale = _scale(deviation, share)
        floor += _moved(part.floor().double(), mean, scale)
        contexts, items, scores = part.rows()
        keys.append(contexts * n_items + items)
        above.append(_moved(scores.double(), part.floor().double()[contexts], scale[contexts]))
    key, total = _added_up(torch.cat(keys), torch.cat(above))
    contexts = key // n_items
    return ListedScores(contexts, key % n_items, floor[contexts] + total, floor, seen)


def _scale(deviation: Tensor, share: float) -> Tensor:
    """What brings scores to a deviation of ``share``; 0 where they are all the same."""
    return (share / deviation).masked_fill(deviation == 0, 0.0)


def _moved(scores: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(score − shift) · scale; 0, and never NaN, where the scale is 0: there, a score may be −inf."""
    return ((scores - shift) * scale).masked_fill(scale == 0, 0.0)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total


def _added_up(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys, ascending, and the sum of the values of each."""
    distinct, place = torch.unique(keys, return_inverse=True)
    return distinct, values.new_zeros(len(distinct)).index_add_(0, place, values)
