"""Scores of some items for each user; all other items have the user's floor as their score."""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_rcekd.core.types import Seen, TeacherScores


class ListedScores(TeacherScores):
    """Scores of some items for each user (or row), the *listed* items.

    Memory grows with the number of listed items. Top-K lists only hold listed items; in them, equal
    scores are ordered by ascending id.

    Args:
        contexts: the user (or row) of each listed score, ``[R]``; each pair of a user and an item
            only once.
        items: the item of each listed score, ``[R]``.
        scores: the listed scores, ``[R]``.
        floor: the score of unlisted items for each user, ``[n_contexts]``; −inf instead for users
            without listed items, whom the teacher does not cover. With ``floor_of_items``: one for
            each item, ``[n_items]``, which is not changed.
        seen: the training interactions, for top-K lists of unseen items.
        floor_of_items: the floor belongs to the items, as after :meth:`transposed`.
    """

    partial = True

    def __init__(
        self,
        contexts: Tensor,
        items: Tensor,
        scores: Tensor,
        floor: Tensor,
        seen: Seen,
        floor_of_items: bool = False,
    ) -> None:
        self.n_contexts, self.n_items = len(seen.starts) - 1, seen.n_ids
        keys, order = (contexts.long() * self.n_items + items.long()).sort()
        self._keys = keys
        self._scores = scores[order].float()
        self._listed = Seen.from_pairs(contexts, items, self.n_contexts, self.n_items)
        # Sorted by user, then from the best score down; both sorts are stable.
        down = self._scores.argsort(descending=True, stable=True)
        self._best_first = self._listed.ids[down[(keys // self.n_items)[down].argsort(stable=True)]]
        self.seen = seen.to(scores.device)
        self._floor_of_items = floor_of_items
        self._floor = floor.float()
        if not floor_of_items:
            self._floor = self._floor.masked_fill(self._listed.counts() == 0, -torch.inf)

    @classmethod
    def with_floor(
        cls, contexts: Tensor, items: Tensor, scores: Tensor, seen: Seen, depth: float = 1.0
    ) -> ListedScores:
        """Listed scores with a floor ``depth`` standard deviations below the user's lowest score.

        The deviation is that of the user's listed scores (divided by their number), or 1 where that
        is 0.

        Args:
            contexts: the user of each listed score, ``[R]``.
            items: the item of each listed score, ``[R]``.
            scores: the listed scores, ``[R]``.
            seen: the training interactions.
            depth: how many standard deviations the floor is below the lowest score.
        """
        n = len(seen.starts) - 1
        exact, rows = scores.double(), contexts.long()
        zeros = exact.new_zeros(n)
        counts = torch.bincount(rows, minlength=n).clamp(min=1)
        mean = zeros.index_add(0, rows, exact) / counts
        deviation = (zeros.index_add(0, rows, (exact - mean[rows]) ** 2) / counts).sqrt()
        lowest = (zeros + torch.inf).scatter_reduce(0, rows, exact, "amin")
        return cls(
            contexts, items, scores, lowest - depth * deviation.where(deviation > 0, 1.0), seen
        )

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The users, items and scores that are listed, ``[R]`` each, sorted by user and item."""
        return self._keys // self.n_items, self._listed.ids, self._scores

    def floor(self) -> Tensor:
        """The score of unlisted items for each user, ``[n_contexts]``.

        After :meth:`transposed` there is one for each item, ``[n_items]``.
        """
        return self._floor

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        contexts, _, scores = self.rows()
        floor = self.floor().double()
        # Unlisted items are at the floor, so their sum above it is 0.
        above = scores.double() - floor[contexts]
        n, zeros = self.n_items - 1, torch.zeros_like(floor)
        mean = zeros.index_add(0, contexts, above) / n
        listed = zeros.index_add(0, contexts, (above - mean[contexts]) ** 2)
        unlisted = (n - torch.bincount(contexts, minlength=self.n_contexts)) * mean**2
        mean = floor + mean
        return mean, (listed + unlisted) / n, mean.abs()

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        floor = (
            self._floor[items]
            if self._floor_of_items
            else self._floor[contexts].unsqueeze(1).expand(items.shape)
        )
        if len(self._keys) == 0:
            return floor.clone()
        wanted = contexts.long().unsqueeze(1) * self.n_items + items.long()
        index = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        return self._scores[index].where(self._keys[index] == wanted, floor)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        contexts = contexts.to(self._scores.device)
        floor = self._floor if self._floor_of_items else self._floor[contexts].unsqueeze(1)
        scores = floor.expand(len(contexts), self.n_items).clone()
        rows, positions = self._listed.positions(contexts)
        scores[rows, self._listed.ids[positions]] = self._scores[positions]
        scores[:, 0] = -torch.inf
        return scores

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; only listed items."""
        contexts = contexts.to(self._scores.device)
        rows, positions = self._listed.positions(contexts)
        items = self._best_first[positions]
        if unseen:
            seen_rows, seen_items = self.seen.cells(contexts)
            left = ~torch.isin(rows * self.n_items + items, seen_rows * self.n_items + seen_items)
            rows, items = rows[left], items[left]
        counts = torch.bincount(rows, minlength=len(contexts))
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        short = rank < k
        lists = torch.zeros((len(contexts), k), dtype=torch.int64, device=contexts.device)
        lists[rows[short], rank[short]] = items[short]
        return lists

    def transposed(self) -> ListedScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; the scores stay the same."""
        contexts, items, scores = self.rows()
        return ListedScores(
            items, contexts, scores, self._floor, self.seen.transposed(), not self._floor_of_items
        )
