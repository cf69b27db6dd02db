"""The base of all distillers: one KD term, called by the trainer in each epoch and each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.losses.base import Loss
from recbole_rcekd.models.product_recorder import Product
from recbole_rcekd.models.scorer import ModelScorer


class Distiller(ABC):
    """The KD term of one loss in one training run.

    Args:
        loss: the method.
        scorer: the student.
        seed: the seed of all random draws. They come from a generator of their own, so RecBole's
            random stream stays the same.
        ranks: this process among those that train the student.

    Attributes:
        loss: the method.
        generator: the source of all random draws.
        steps: how many steps there were in this epoch.
        needs_rows: the batches must have the ids of their rows, and the products of the base loss
            must be recorded.
    """

    needs_rows: ClassVar[bool] = False

    def __init__(
        self, loss: Loss, scorer: ModelScorer, seed: int, ranks: Ranks | None = None
    ) -> None:
        self.loss = loss
        self._scorer = scorer
        self._ranks = ranks or Ranks()
        self.generator = torch.Generator(scorer.device).manual_seed(self._ranks.seed(seed))
        self.steps = 0

    def begin_epoch(self, epoch: int, n_steps: int) -> None:
        """Prepare an epoch.

        Args:
            epoch: the number of the epoch, from 0.
            n_steps: how many steps it has.
        """
        self.steps = 0
        self._prepare(epoch, n_steps)

    def step(self, batch: Any, products: Sequence[Product] = ()) -> Tensor:
        """The KD loss of one step, a scalar with gradient.

        Args:
            batch: this rank's rows, as RecBole's loader gave them.
            products: the products with the item table that the base loss computed; empty unless
                ``needs_rows``.
        """
        self.steps += 1
        return self._kd_loss(batch, products)

    def diagnostics(self) -> dict[str, float]:
        """How far the student is from its teacher, by name, on the same few users in every epoch.

        The student is in evaluation mode meanwhile, and RecBole's random stream stays the same.
        """
        with preserved_random_state(), self._scorer.evaluating():
            return self._diagnostics()

    def _prepare(self, epoch: int, n_steps: int) -> None:  # noqa: B027  (optional)
        """Prepare what an epoch needs; by default nothing."""

    @abstractmethod
    def _kd_loss(self, batch: Any, products: Sequence[Product]) -> Tensor:
        """See :meth:`step`."""

    @abstractmethod
    def _diagnostics(self) -> dict[str, float]:
        """See :meth:`diagnostics`."""
