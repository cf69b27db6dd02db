"""What a distillation loss is: settings, perhaps weights of its own, and a pure function.

* :class:`KDLoss`: of *scores*. A recipe for item sets, and a formula on the student's scores of
  them.
* :class:`EmbeddingLoss`: of *vectors*. A formula on the student's and the teacher's rows of some
  users and items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from recbole_rcekd.core.settings import LossSettings
from recbole_rcekd.core.types import ItemSets, Seen, Vectors
from recbole_rcekd.losses.candidates import Candidates

# So many contexts are looked at in full where a loss tunes itself.
TUNED_ON = 64


class Loss(nn.Module):
    """What every method has.

    Parameters of a loss (projectors, gates) are learned with the student's and kept in a file of
    their own beside its checkpoint.

    Attributes:
        settings_type: the settings class; its keys are those of ``properties/loss/<name>.yaml``,
            the weight first.
        needs_teacher: ``False`` for controls that learn from the training interactions alone.
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
        """With what its settings' keys begin."""
        return cls.settings_type.prefix

    @property
    def weight(self) -> float:
        """λ of ``base + λ · KD``: the setting ``<prefix>_weight``."""
        value: float = getattr(self.settings, f"{self.prefix()}_weight")
        return value


class KDLoss(Loss, ABC):
    """A method that distils scores.

    A subclass binds its settings to two things that can be tested apart: :meth:`select` says what
    each user is scored on (here, and only here, things are drawn) and :meth:`forward` is the
    formula.

    Attributes:
        renewed: whether :meth:`select` chooses anew each time (it looks at the student, or draws);
            if not, it is called once.
        scores_all_items: ``forward`` takes the student's scores of the whole catalogue, ``[B, N]``.
        teaches_all_items: ``forward`` takes the teacher's scores of the whole catalogue too.
        masks_seen: ``forward`` is told in ``sets.seen`` what the B contexts have in the training
            data (their places 0 to B − 1 as contexts).
        tuned: :meth:`tune` wants to be called.
        temperature: τ, by which both sides' scores are divided before their softmax; read by the
            closure gap.
        uses_trajectory: lists are taken from the teacher's earlier checkpoints too
            (``lists.trajectories``).
        checkpoints: files of these, the least trained first; none: those that lie beside the
            teacher's.
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
    def select(self, lists: Candidates) -> ItemSets:
        """Choose the items that each context of ``lists`` is taught on."""

    @abstractmethod
    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The loss of each row.

        Args:
            student_scores: scores of ``sets.items``, ``[B, T]``, with gradient; of all items where
                ``scores_all_items`` is set (column 0 is the padding item).
            sets: the B rows of what :meth:`select` chose.

        Returns:
            ``[B]``; the trainer weighs and sums the rows.
        """

    def prepare(self, n_contexts: int, device: torch.device) -> None:
        """Called once before the first :meth:`select`, for what is remembered of each context (``lists.ids``)."""

    def tune(self, lists: Candidates) -> None:
        """Called before each epoch's lists with a few random contexts, where ``tuned`` is set."""

    def metrics(self) -> dict[str, float]:
        """What the log and the history should say of the loss itself in this epoch, by name."""
        return {}

    def closure_sets(self, sets: ItemSets) -> tuple[ItemSets, ItemSets] | None:
        """The pair (J, A) whose closure gap is worth watching, targets J inside the normaliser A; ``None``: no pair."""
        return None

    def item_side(self) -> tuple[KDLoss, float] | None:
        """A loss over users for each *item*, with its weight, for methods that distil both ways."""
        return None

    def feature_side(self) -> tuple[EmbeddingLoss, float] | None:
        """A loss of vectors with its weight, for methods that distil both."""
        return None


class EmbeddingLoss(Loss, ABC):
    """A method that distils vectors: the rows of the two tables whose product a model's scores are.

    Its settings have a key ``<name>_sides`` (``both``, ``users`` or ``items``). It learns on what
    stands in the training batch, whatever ``kd_schedule`` says.

    Attributes:
        left_out_by: the setting that leaves it out, where it is a part of a method of scores; for
            messages.
    """

    left_out_by: ClassVar[str] = ""

    @property
    def sides(self) -> tuple[str, ...]:
        """``users`` and ``items``, or one of them."""
        (key,) = [key for key in type(self).settings_type.keys() if key.endswith("_sides")]
        value: str = getattr(self.settings, key)
        return ("users", "items") if value == "both" else (value,)

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """Make the parts that are learned, and what is read off the training interactions (graphs).

        Args:
            student_width: of the student's vectors.
            teacher_width: of the teacher's.
            seen: the training interactions of users; of items: ``seen.transposed()``.
            generator: the source of all draws, here and in training; its device is where the parts
                should be.
        """

    @staticmethod
    def sum_over_sides(
        of_side: Callable[[str, Vectors], Tensor], users: Vectors | None, items: Vectors | None
    ) -> Tensor:
        """The sum of ``of_side(side, vectors)`` over the sides that are there."""
        given = {"users": users, "items": items}
        parts = [of_side(side, vectors) for side, vectors in given.items() if vectors is not None]
        return torch.stack(parts).sum()

    def begin_epoch(self, progress: float) -> None:
        """Called before each epoch; ``progress`` is the share of ``epochs`` behind, for temperatures that fall."""

    def needed(self, side: str, ids: Tensor) -> Tensor:
        """Whose vectors the loss of ``ids`` takes: these first, then others (neighbours in a graph)."""
        return ids

    @abstractmethod
    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The loss of a batch, summed over its distinct users and items (the trainer divides by the batch's rows).

        Args:
            users: vectors of the batch's distinct users; ``None`` if that side is not distilled.
            items: of its distinct items, positive and negative, likewise.

        Returns:
            A scalar.
        """
