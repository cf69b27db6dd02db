"""A teacher's scores as two tables or as a memory-mapped matrix, and its top-K lists."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.functional import full_precision
from recbole_rcekd.core.products import picked_products
from recbole_rcekd.core.store import Store
from recbole_rcekd.core.top_k import CELLS_AT_A_TIME, ProductRanking, Ranking, RowRanking
from recbole_rcekd.core.types import Seen, TeacherScores


class Scores(TeacherScores):
    """The base of both kinds of scores: top-K lists, made for all users at once and kept.

    They are kept in memory and on disk. With several ranks, each rank makes and keeps the lists of
    its own users; the files have those of all users.

    Args:
        n_contexts: how many users (or rows of sequences) there are, padding included.
        n_items: how many items there are, padding included.
        seen: the training interactions, for top-K lists of unseen items.
        store: where top-K lists are kept between runs; ``None``: in memory only.
        side: the name of the users' side in the store.
        ranks: this process among those that share the work of the top-K lists.
    """

    def __init__(
        self,
        n_contexts: int,
        n_items: int,
        seen: Seen,
        store: Store | None,
        side: str,
        ranks: Ranks,
    ) -> None:
        self.n_contexts = n_contexts
        self.n_items = n_items
        self._seen = seen
        self._store = store
        self._side = side
        self._ranks = ranks
        self._lists: dict[bool, Tensor] = {}

    @abstractmethod
    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""

    @abstractmethod
    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`.

        With several ranks, a rank may only ask for users that it owns, and the first calls of all
        ranks must have the same ``k``.
        """
        width = min(k, self.n_items - 1)
        lists = self._lists.get(unseen)
        if lists is None or lists.shape[1] < width:
            lists = self._lists[unseen] = self._open_lists(width, unseen).to(contexts.device)
        return torch.nn.functional.pad(
            lists[self._ranks.row(contexts), :width].long(), (0, k - width)
        )

    def _open_lists(self, k: int, unseen: bool) -> Tensor:
        name = f"top-{k}-{'unseen' if unseen else 'all'}-{self._side}{self._rounded}"
        alone = self._ranks.world == 1
        found = self._store.read(name, mmap=not alone) if self._store else None
        # The ranks decide together: if one does not find the lists, all make them.
        if self._ranks.all(found is not None) and found is not None:
            ids = found["ids"]
            return torch.from_numpy(
                ids if alone else np.array(ids[self._ranks.rank :: self._ranks.world])
            )
        lists = self._make_lists(k, unseen)
        if self._store:
            whole = self._ranks.whole(lists, self.n_contexts)
            if whole is not None:
                write_if_possible(self._store, name, {"ids": whole.numpy()})
        return lists

    @property
    def _rounded(self) -> str:
        """The dtype that scores are rounded to, for the names of the lists' files.

        Scores of another dtype have other ties, so they give other lists.
        """
        return ""

    def _make_lists(self, k: int, unseen: bool) -> Tensor:
        own = self._ranks.own(torch.arange(self.n_contexts))
        getLogger().info(
            f"Teacher lists: the best {k} items of {len(own)} users or sequences, made once"
        )
        return self._ranking().top_k(own, k, self._seen if unseen else None).int().cpu()

    def _ranking(self) -> Ranking:
        return RowRanking(self.score_all, self.n_items)


class FactorScores(Scores):
    """Scores that are the product of two tables.

    Args:
        context_factors: the embeddings of users (or rows), ``[n_contexts, d]``, float32.
        item_factors: the embeddings of items, ``[n_items, d]``, float32; row 0 is padding.
        seen: the training interactions, for top-K lists of unseen items.
        store: where top-K lists are kept between runs; ``None``: in memory only.
        side: the name of the users' side in the store.
        ranks: this process among those that share the work of the top-K lists.
    """

    def __init__(
        self,
        context_factors: Tensor,
        item_factors: Tensor,
        seen: Seen,
        store: Store | None = None,
        side: str = "users",
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(
            len(context_factors), len(item_factors), seen, store, side, ranks or Ranks()
        )
        self.context_factors = context_factors
        self.item_factors = item_factors

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return picked_products(self.context_factors[contexts], self.item_factors, items)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        with full_precision(self.item_factors.device):
            scores = self.context_factors[contexts] @ self.item_factors.t()
        scores[:, 0] = -torch.inf
        return scores

    def _ranking(self) -> Ranking:
        return ProductRanking(lambda contexts: self.context_factors[contexts], self.item_factors)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self.context_factors, self.item_factors

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`.

        They follow from the mean and the covariance of the item embeddings.
        """
        mean_row, others = centred(self.item_factors)
        rows = self.context_factors.double()
        covariance = others[1:].t() @ others[1:] / (self.n_items - 1)
        mean, variance = rows @ mean_row, ((rows @ covariance) * rows).sum(1).clamp(min=0.0)
        size = rows.norm(dim=1) * self.item_factors[1:].double().square().sum(1).mean().sqrt()
        return mean, variance, size

    def transposed(self) -> FactorScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return FactorScores(
            self.item_factors,
            self.context_factors,
            self._seen.transposed(),
            self._store,
            side=f"by-{self._side}",
            ranks=self._ranks,
        )


class DenseScores(Scores):
    """Scores that are a matrix on disk, which is memory-mapped.

    Args:
        matrix: the scores, ``[n_contexts, n_items]``, float16 or float32, as
            ``np.load(..., mmap_mode="r")`` returns them.
        seen: the training interactions, for top-K lists of unseen items.
        store: where top-K lists are kept between runs; ``None``: in memory only.
        device: the device on which scores are returned.
        side: the name of the users' side in the store.
        ranks: this process among those that share the work of the top-K lists.
    """

    def __init__(
        self,
        matrix: np.ndarray[Any, Any],
        seen: Seen,
        store: Store | None = None,
        device: torch.device | None = None,
        side: str = "users",
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(matrix.shape[0], matrix.shape[1], seen, store, side, ranks or Ranks())
        self._matrix = matrix
        self._device = device or torch.device("cpu")

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        cells = self._matrix[contexts.cpu().numpy()[:, None], items.cpu().numpy()]
        return torch.from_numpy(cells.astype(np.float32)).to(self._device)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        rows = torch.from_numpy(self._matrix[contexts.cpu().numpy()].astype(np.float32)).to(
            self._device
        )
        rows[:, 0] = -torch.inf
        return rows

    @property
    def _rounded(self) -> str:
        return f"-{self._matrix.dtype}"

    def transposed(self) -> DenseScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        side = f"by-{self._side}"
        return DenseScores(
            self._matrix.T, self._seen.transposed(), self._store, self._device, side, self._ranks
        )


def blocks(n_contexts: int, n_items: int, cells: int = CELLS_AT_A_TIME) -> Iterator[Tensor]:
    """The ids 0 to ``n_contexts`` − 1, in blocks whose full rows have about ``cells`` scores."""
    step = max(1, cells // n_items)
    for start in range(0, n_contexts, step):
        yield torch.arange(start, min(start + step, n_contexts))


def centred(table: Tensor) -> tuple[Tensor, Tensor]:
    """The mean row of a table, and the table minus the mean row, in float64.

    Row 0, the padding, is left out of the mean, and is 0 in the result.
    """
    exact = table.double()
    mean = exact[1:].mean(0)
    centred = exact - mean
    centred[0] = 0.0
    return mean, centred


def write_if_possible(store: Store, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Keep arrays in a store for the next run; if that fails, warn and go on."""
    try:
        store.write(name, arrays)
    except OSError as error:
        getLogger().warning(
            f"The teacher's scores could not be kept in [{store.root}] "
            f"({error.strerror or error}); this run goes on with them in memory, the next will "
            "compute them again."
        )
