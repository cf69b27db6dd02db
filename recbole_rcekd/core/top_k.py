r"""The exact top-K of many users, without sorting whole rows of scores.

If scores are inner products, most of the product is computed in half precision
(:class:`ProductRanking`):

1. **Upper bounds.** Rounding the rows to bfloat16, :math:`u' = u - \delta u` and
   :math:`v' = v - \delta v`, moves a score by at most
   :math:`\lVert\delta u\rVert\lVert v\rVert + \lVert u\rVert\lVert\delta v\rVert` and a term of
   second order. Two more columns add this to the product, so it gives
   :math:`a_{ui} \ge s_{ui} = u\cdot v_i`.
2. **A threshold** t for each user, guessed from every 16th item so that somewhat more than k items
   reach it.
3. **Candidates** are the items whose bound reaches t. Only they are scored exactly, and sorted.
4. **A certificate.** An item that is no candidate has :math:`s_{ui} \le a_{ui} < t`. (The product
   itself is rounded to bfloat16, which does not matter: t is a bfloat16 number, and rounding keeps
   the order.) So if the k-th best candidate scores at least t, no better item was missed. If not,
   the user is tried again with more candidates, and in the end from the full row of scores.

``benchmarks/README.md`` says what that saves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_rcekd.core.functional import full_precision
from recbole_rcekd.core.products import scores_at
from recbole_rcekd.core.types import Seen

# Full rows are scored and ranked in blocks of so many scores: 4 MB of float32, which stay in a
# CPU's cache between the product and the selection (three times faster than blocks of 16 MB, see
# benchmarks/README.md).
CELLS_AT_A_TIME = 1_000_000
_GROUP_SIZE = 8
# _SUMS is a share of the product of the norms. It covers sums in float32 (of up to 1,700 terms,
# each rounded the wrong way) and the term of second order. The factor _COLUMNS covers the rounding
# of the two columns.
_SUMS, _COLUMNS = 2.0**-14, 1.0 + 2.0**-7
# Outside this range the squares and products of norms may underflow or overflow. A smaller norm is
# raised to the smallest. If the table has a larger norm, or NaN, all users are ranked from full
# rows. (A user whose row has one never gets a certificate: its bounds are infinite or NaN.)
_SMALLEST_NORM, _LARGEST_NORM = 1e-12, 1e18
# The threshold is guessed from every 16th item, for this many times k candidates. More candidates
# take more time; with fewer, the certificate fails more often. Users without a certificate are
# tried again with more.
_SAMPLED = 16
_SPARE = (1.6, 3.2, 12.8)
# With fewer than k times this many items, ranking full rows is as fast.
_WORTHWHILE = 32
# The bounds of so many users stay in the cache; the rows of so many users are gathered at once.
_CONTEXTS_AT_A_TIME, _ROWS_AT_A_TIME = 32, 1024
# One number of 63 bits per candidate: its user (5 bits), its score (31), its position (27).
_SCORE_AT, _CONTEXT_AT = 27, 58
_MOST_ITEMS = (1 << _SCORE_AT) // _CONTEXTS_AT_A_TIME
_WITHOUT_SIGN = 0x7FFFFFFF


def top_k(rows: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` best items of each row of full scores, best first; 0 for a score of −inf.

    Exact, in two steps: the k best items are in the k groups with the best maxima. So the k best
    groups are selected first, and then the k best items in them. Item i is in group i mod G, so
    that all maxima take one vectorised pass.
    """
    n, width = rows.shape
    k = min(k, width)
    groups = width // _GROUP_SIZE
    if groups < 2 * k:
        return _ids(*rows.topk(k, dim=1))
    whole = rows[:, : groups * _GROUP_SIZE].view(n, _GROUP_SIZE, groups)
    best_groups = whole.amax(1).topk(k, dim=1, sorted=False).indices
    members = best_groups.unsqueeze(1) + groups * torch.arange(
        _GROUP_SIZE, device=rows.device
    ).view(1, -1, 1)
    leftover = torch.arange(groups * _GROUP_SIZE, width, device=rows.device).expand(n, -1)
    candidates = torch.cat([members.flatten(1), leftover], dim=1)
    best, place = rows.gather(1, candidates).topk(k, dim=1)
    return _ids(best, candidates.gather(1, place))


def _ids(scores: Tensor, ids: Tensor) -> Tensor:
    return ids.masked_fill(scores == -torch.inf, 0)


class Ranking(ABC):
    """Top-K lists by the scores as they are now; not valid after the scores change."""

    @abstractmethod
    def top_k(self, contexts: Tensor, k: int, without: Seen | None = None) -> Tensor:
        """Ids ``[n, k]`` of the best items, best first; 0 where there are fewer than ``k``.

        Args:
            contexts: ids of users (or of rows of sequences), ``[n]``.
            k: length of the lists.
            without: leave out the items that the users have there.
        """


class RowRanking(Ranking):
    """Top-K lists from full rows of scores, a few users at a time.

    Args:
        score_all: a function of ids of users ``[n]``, which returns the scores of every item
            ``[n, n_items]``, −inf at the padding item. The tensor is overwritten.
        n_items: how many items there are, padding included.
    """

    def __init__(self, score_all: Callable[[Tensor], Tensor], n_items: int) -> None:
        self._score_all = score_all
        self._n_items = n_items

    def top_k(self, contexts: Tensor, k: int, without: Seen | None = None) -> Tensor:
        """See :class:`Ranking`."""
        lists = []
        for part in torch.split(contexts, max(1, CELLS_AT_A_TIME // self._n_items)):
            rows = self._score_all(part)
            if without is not None:
                rows[without.cells(part)] = -torch.inf
            lists.append(top_k(rows, k))
        return torch.cat(lists)


class ProductRanking(Ranking):
    """Top-K lists from a product of two tables; fast on a CPU with bfloat16 arithmetic.

    Args:
        rows_of: a function of ids of users ``[n]``, which returns their rows ``[n, d]``.
        table: ``[n_items, d]``; row 0 is padding and never in a list.
    """

    def __init__(self, rows_of: Callable[[Tensor], Tensor], table: Tensor) -> None:
        self._rows_of = rows_of
        self._table = table
        self._from_rows = RowRanking(self._score_all, len(table))
        self._fast = (
            table.device.type == "cpu"
            and table.dtype == torch.float32
            and len(table) <= _MOST_ITEMS
            and has_bfloat16_arithmetic()
            and bool((table[1:].norm(dim=1) < _LARGEST_NORM).all())  # false for NaN too
        )
        self._half: Tensor | None = None

    def top_k(self, contexts: Tensor, k: int, without: Seen | None = None) -> Tensor:
        """See :class:`Ranking`."""
        if not self._fast or len(self._table) < _WORTHWHILE * k:
            return self._from_rows.top_k(contexts, k, without)
        lists = torch.empty((len(contexts), k), dtype=torch.int64)
        left = torch.arange(len(contexts))
        for spare in _SPARE:
            for part in torch.split(left, _ROWS_AT_A_TIME):
                lists[part] = self._by_candidates(contexts[part], k, without, spare)
            # A list without a certificate begins with 0, as no other does.
            left = left[lists[left, 0] == 0]
        if len(left):
            lists[left] = self._from_rows.top_k(contexts[left], k, without)
        return lists

    def _by_candidates(
        self, contexts: Tensor, k: int, without: Seen | None, spare: float
    ) -> Tensor:
        """The lists ``[n, k]`` by candidates; all 0 for users without a certificate."""
        if self._half is None:
            self._half = _with_norms(self._table, of_contexts=False).t()
        all_rows, n_items = self._rows_of(contexts), len(self._table)
        all_half = _with_norms(all_rows, of_contexts=True)
        all_bounds = torch.empty(
            (min(_CONTEXTS_AT_A_TIME, len(contexts)), n_items), dtype=torch.bfloat16
        )
        all_reached = np.empty(all_bounds.shape, dtype=bool)
        from_last = -1 - torch.arange(k)
        lists = []
        blocks = (torch.split(x, _CONTEXTS_AT_A_TIME) for x in (contexts, all_rows, all_half))
        for part, rows, half in zip(*blocks, strict=True):
            n = len(part)
            bounds = torch.mm(half, self._half, out=all_bounds[:n])
            bounds[:, 0] = -torch.inf
            if without is not None:
                bounds[without.cells(part)] = -torch.inf
            sample = (
                bounds[:, ::_SAMPLED]
                .topk(int(k * spare / _SAMPLED) + 1, dim=1, sorted=False)
                .values
            )
            threshold = sample.amin(1, keepdim=True).clamp_(min=torch.finfo(torch.bfloat16).tiny)
            # Positive bfloat16 numbers have the order of their bits, and numpy compares integers
            # fast.
            reached = np.greater_equal(_bits(bounds), _bits(threshold), out=all_reached[:n])
            hits = np.flatnonzero(reached)
            starts = torch.from_numpy(np.searchsorted(hits, np.arange(n + 1) * n_items))
            if len(hits) == 0:
                lists.append(torch.zeros((n, k), dtype=torch.int64))
                continue
            context = torch.repeat_interleave(torch.arange(n), starts.diff())
            items = torch.from_numpy(hits).sub_(context, alpha=n_items)
            scores = scores_at(starts, items, rows, self._table).clamp_(min=0.0)
            # One sort for all, by user and then by score. The bits of scores have their order too
            # (−0 without its sign).
            bits = (scores.view(torch.int32) & _WITHOUT_SIGN).long()
            keys = (context << _CONTEXT_AT) | (bits << _SCORE_AT) | torch.arange(len(items))
            order = torch.from_numpy(np.sort(keys.numpy())) & ((1 << _SCORE_AT) - 1)
            best = order[(starts[1:, None] + from_last).clamp_(min=0)]
            certain = (starts.diff() >= k) & (scores[best[:, -1]] >= threshold.squeeze(1))
            lists.append(items[best].masked_fill_(~certain.unsqueeze(1), 0))
        return torch.cat(lists)

    def _score_all(self, contexts: Tensor) -> Tensor:
        with full_precision(self._table.device):
            scores = self._rows_of(contexts).to(self._table.dtype) @ self._table.t()
        scores[:, 0] = -torch.inf
        return scores


def has_bfloat16_arithmetic() -> bool:
    """Whether this CPU has instructions for bfloat16; without them float32 is faster."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def _with_norms(rows: Tensor, of_contexts: bool) -> Tensor:
    """Rows in bfloat16 with two more columns, whose products bound the error of rounding."""
    half = rows.bfloat16()
    norms = rows.norm(dim=1).clamp_(min=_SMALLEST_NORM)
    lost = (rows - half).norm(dim=1) + _SUMS * norms
    columns = torch.stack((lost, norms) if of_contexts else (norms, lost), dim=1)
    return torch.cat([half, (_COLUMNS * columns).bfloat16()], dim=1)


def _bits(x: Tensor) -> np.ndarray[Any, Any]:
    bits: np.ndarray[Any, Any] = x.view(torch.int16).numpy()
    return bits
