"""What the trainer calls once an epoch and once a step: one KD term of one training run."""

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
    """Base of all distillers: draws from a generator of its own, and counts its steps.

    Args:
        loss: which method.
        scorer: the student.
        seed: of all draws; they use a generator of their own, so RecBole's random stream is
            untouched.
        ranks: this process among those that train the student.

    Attributes:
        loss: as given.
        generator: the source of all draws.
        steps: how many there were in this epoch.
        needs_rows: batches must carry the numbers of their rows, and what the base loss multiplies
            with the item table is recorded.
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
            epoch: its number, from 0.
            n_steps: how many steps RecBole's loader makes of it.
        """
        self.steps = 0
        self._prepare(epoch, n_steps)

    def step(self, batch: Any, products: Sequence[Product] = ()) -> Tensor:
        """The KD loss of one step, a scalar with gradient.

        Args:
            batch: this rank's rows, as RecBole's loader gave them.
            products: what the base loss multiplied with the item table; empty unless
                ``needs_rows``.
        """
        self.steps += 1
        return self._kd_loss(batch, products)

    def diagnostics(self) -> dict[str, float]:
        """How far the student is from its teacher, by name: on the same few users in every epoch.

        The student is asked in evaluation mode, and RecBole's random stream stays where it was.
        """
        with preserved_random_state(), self._scorer.evaluating():
            return self._diagnostics()

    def _prepare(self, epoch: int, n_steps: int) -> None:  # noqa: B027  (optional)
        """What an epoch needs; nothing unless overridden."""

    @abstractmethod
    def _kd_loss(self, batch: Any, products: Sequence[Product]) -> Tensor:
        """See :meth:`step`."""

    @abstractmethod
    def _diagnostics(self) -> dict[str, float]:
        """See :meth:`diagnostics`."""
