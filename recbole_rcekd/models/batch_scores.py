"""The student's scores of the rows of one training batch.

They are computed once, and used for the student's top-K lists and, with gradient, for the loss. A
row is given by its position in the batch, 0 to B − 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from recbole_rcekd.core.products import picked_products
from recbole_rcekd.core.top_k import ProductRanking, Ranking, RowRanking


class BatchScores(ABC):
    """The student's scores of a batch of B rows."""

    @abstractmethod
    def ranking(self) -> Ranking:
        """The ranking by these scores, without gradient."""

    @abstractmethod
    def score(self, items: Tensor) -> Tensor:
        """Scores of ``items [B, T]``, ``[B, T]``."""

    @abstractmethod
    def score_all(self) -> Tensor:
        """Scores of every item, ``[B, n_items]``; −inf at the padding item."""

    @abstractmethod
    def part(self, positions: Tensor) -> BatchScores:
        """The scores of the rows at ``positions``."""


class DenseBatchScores(BatchScores):
    """The scores of a batch, from full rows of scores.

    Args:
        scores: the student's scores of all items, ``[B, n_items]``.
    """

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def ranking(self) -> Ranking:
        """See :class:`BatchScores`."""
        scores = self._scores.detach()

        def rows_of(positions: Tensor) -> Tensor:
            rows = scores[positions].float()
            rows[:, 0] = -torch.inf
            return rows

        return RowRanking(rows_of, scores.shape[1])

    def score(self, items: Tensor) -> Tensor:
        """See :class:`BatchScores`."""
        return self._scores.gather(1, items.long())

    def score_all(self) -> Tensor:
        """See :class:`BatchScores`."""
        padding = torch.zeros(self._scores.shape[1], dtype=torch.bool, device=self._scores.device)
        padding[0] = True
        return self._scores.masked_fill(padding, -torch.inf)

    def part(self, positions: Tensor) -> DenseBatchScores:
        """See :class:`BatchScores`."""
        return DenseBatchScores(self._scores[positions])


class FactoredBatchScores(BatchScores):
    """The scores of a batch as a product of two tables.

    Args:
        rows: the embeddings of the batch's rows, ``[B, d]``.
        table: the embeddings of the items, ``[n_items, d]``.
        product: ``rows @ table.T``, if the base loss has computed it already.
    """

    def __init__(self, rows: Tensor, table: Tensor, product: Tensor | None = None) -> None:
        self._rows = rows
        self._table = table
        self._known = None if product is None else DenseBatchScores(product)

    def ranking(self) -> Ranking:
        """See :class:`BatchScores`."""
        rows = self._rows.detach().float()
        return ProductRanking(lambda positions: rows[positions], self._table.detach().float())

    def score(self, items: Tensor) -> Tensor:
        """See :class:`BatchScores`."""
        if self._known is not None:
            return self._known.score(items)
        return picked_products(self._rows, self._table, items.long())

    def score_all(self) -> Tensor:
        """See :class:`BatchScores`."""
        return (self._known or DenseBatchScores(self._rows @ self._table.t())).score_all()

    def part(self, positions: Tensor) -> BatchScores:
        """See :class:`BatchScores`."""
        return (
            FactoredBatchScores(self._rows[positions], self._table)
            if self._known is None
            else self._known.part(positions)
        )
