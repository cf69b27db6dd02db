"""What a distillation loss is: settings, parameters if it learns any, and a pure function.

* :class:`KDLoss` distils *scores*. It chooses item sets, and its formula takes the student's scores
  of these items.
* :class:`EmbeddingLoss` distils *embeddings*. Its formula takes the student's and the teacher's
  embeddings of some users and items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recbole_rcekd.core.settings import LossSettings
from recbole_rcekd.core.types import ItemSets, Seen, Vectors
from recbole_rcekd.losses.candidates import Candidates

# For how many users a loss asks for the scores of all items when it tunes itself.
TUNED_ON = 64


class Loss(nn.Module):
    """What every method has.

    The parameters of a loss (projectors, gates) are trained together with the student's. They are
    saved in a file of their own, beside the student's checkpoint.

    Attributes:
        settings_type: the settings class. Its keys are those of ``properties/loss/<name>.yaml``,
            the weight first.
        needs_teacher: ``False`` for controls, which learn from the training interactions alone.
        replaces_base: the model's own loss is left out, whatever ``kd_base_weight`` says.
    """

    settings_type: ClassVar[type[LossSettings]]
    needs_teacher: ClassVar[bool] = True
    replaces_base: ClassVar[bool] = False

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def prefix(cls) -> str:
        """The prefix of all its keys."""
        return cls.settings_type.prefix

    def _setting(self, name: str) -> Any:
        """The value of the key ``<prefix>_<name>``."""
        return getattr(self.settings, f"{self.prefix()}_{name}")

    @property
    def weight(self) -> float:
        """λ of ``base + λ · KD``: the setting ``<prefix>_weight``."""
        value: float = self._setting("weight")
        return value


class KDLoss(Loss, ABC):
    """A method that distils scores.

    A subclass has two parts that can be tested apart. :meth:`select` chooses the items that each
    user learns from; all random draws are made here. :meth:`forward` is the formula.

    For a sequential model, read *row of the training data* (a sequence and its next item) where
    this package says *user*.

    Attributes:
        renewed: whether :meth:`select` chooses anew each time, because it looks at the student or
            draws at random. If not, it is called once.
        scores_all_items: ``forward`` takes the student's scores of all items, ``[B, N]``.
        teaches_all_items: ``forward`` takes the teacher's scores of all items too.
        masks_seen: ``forward`` finds the training items of the B users in ``sets.seen``, where the
            users are numbered from 0 to B − 1.
        tuned: :meth:`tune` is to be called.
        temperature: τ, which divides the scores of student and teacher before their softmax. The
            closure gap is computed with it.
        uses_trajectory: :meth:`select` uses earlier checkpoints of the teacher too
            (``candidates.trajectories``).
        checkpoints: files of these checkpoints, the least trained first. If empty, those that lie
            beside the teacher's checkpoint are used.
    """

    renewed: bool = True
    scores_all_items: bool = False
    teaches_all_items: bool = False
    masks_seen: bool = False
    tuned: bool = False
    temperature: float = 1.0
    uses_trajectory: bool = False
    checkpoints: Sequence[str] = ()

    @abstractmethod
    def select(self, candidates: Candidates) -> ItemSets:
        """Choose the items that each user of ``candidates`` learns from."""

    @abstractmethod
    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The loss of each user.

        Args:
            student_scores: scores of ``sets.items``, ``[B, T]``, with gradient. Scores of all items
                where ``scores_all_items`` is set (column 0 is the padding item).
            sets: the rows that :meth:`select` made for these B users.

        Returns:
            ``[B]``; the trainer weights and sums it.
        """

    def prepare(self, n_contexts: int, device: torch.device) -> None:
        """Called once before the first :meth:`select`.

        For losses that remember something about each user (by ``candidates.ids``).

        Args:
            n_contexts: the number of users.
            device: where the remembered tensors should be.
        """

    def tune(self, candidates: Candidates) -> None:
        """Called with a few random users before each epoch, if ``tuned`` is set."""

    def metrics(self) -> dict[str, float]:
        """What the loss reports about itself after this epoch, by name (log and history)."""
        return {}

    def closure_sets(self, sets: ItemSets) -> tuple[ItemSets, ItemSets] | None:
        """The pair (J, A) whose closure gap is reported; ``None`` if there is none.

        J are the targets, A ⊇ J the items of the normaliser.
        """
        return None

    def item_side(self) -> tuple[KDLoss, float] | None:
        """A loss over users for each *item*, with its weight, if the method has one."""
        return None

    def embedding_side(self) -> tuple[EmbeddingLoss, float] | None:
        """A loss on embeddings, with its weight, if the method has one."""
        return None


class EmbeddingLoss(Loss, ABC):
    """A method that distils embeddings: the rows of the two tables whose product the scores are.

    Its settings have a key ``<prefix>_sides`` (``both``, ``users`` or ``items``). It learns from
    the users and items of the training batch, whatever ``kd_schedule`` says.

    Attributes:
        left_out_by: the setting that turns it off, where it is a part of a :class:`KDLoss`. Used in
            messages.
    """

    left_out_by: ClassVar[str] = ""

    @property
    def sides(self) -> tuple[str, ...]:
        """``users`` and ``items``, or one of them."""
        value: str = self._setting("sides")
        return ("users", "items") if value == "both" else (value,)

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """Make the learned parts, and whatever is computed from the training data (graphs).

        Args:
            student_width: of the student's embeddings.
            teacher_width: of the teacher's embeddings.
            seen: the training items of each user; ``seen.transposed()`` has the users of each item.
            generator: the source of all random draws, here and in training. The parts are made on
                its device.
        """

    @staticmethod
    def sum_over_sides(
        of_side: Callable[[str, Vectors], Tensor], users: Vectors | None, items: Vectors | None
    ) -> Tensor:
        """The sum of ``of_side(side, vectors)`` over the sides that are given."""
        given = {"users": users, "items": items}
        parts = [of_side(side, vectors) for side, vectors in given.items() if vectors is not None]
        return torch.stack(parts).sum()

    def begin_epoch(self, progress: float) -> None:
        """Called before each epoch, for temperatures that fall.

        Args:
            progress: the share of ``epochs`` that is over.
        """

    def needed(self, side: str, ids: Tensor) -> Tensor:
        """The ids whose embeddings the loss of ``ids`` needs.

        First ``ids`` themselves, then others, such as their neighbours in a graph.
        """
        return ids

    @abstractmethod
    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The loss of a batch, summed over its distinct users and items.

        The trainer divides it by the rows of the batch.

        Args:
            users: embeddings of the batch's distinct users; ``None`` if this side is not distilled.
            items: embeddings of its distinct items, positive and negative; ``None`` if this side is
                not distilled.

        Returns:
            A scalar.
        """
