"""What a distillation loss is: a recipe for its item sets, and a pure function of scores on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from recbole_rcekd.item_sets import Lists
from recbole_rcekd.settings import LossSettings
from recbole_rcekd.types import ItemSets


class KDLoss(ABC):
    """One distillation method.

    A subclass binds its settings to two things that can be tested apart: :meth:`select` says what each user is
    scored on (here, and only here, things are drawn) and :meth:`forward` is the formula.

    Attributes:
        settings_type: the settings class; its keys are those of ``properties/loss/<name>.yaml``.
        renewed: whether :meth:`select` chooses anew each time (it looks at the student, or draws); if not, it is
            called once.
        scores_all_items: ``forward`` takes the student's scores of the whole catalogue, ``[B, N]``.
        teaches_all_items: ``forward`` takes the teacher's scores of the whole catalogue too.
    """

    settings_type: ClassVar[type[LossSettings]]
    renewed: bool = True
    scores_all_items: bool = False
    teaches_all_items: bool = False

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    @abstractmethod
    def select(self, lists: Lists) -> ItemSets:
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

    def closure_sets(self, sets: ItemSets) -> tuple[ItemSets, ItemSets] | None:
        """The pair (J, A) whose closure gap is worth watching, targets J inside the normaliser A; ``None``: no pair."""
        return None

    def item_side(self) -> tuple[KDLoss, float] | None:
        """A loss over users for each *item*, with its weight, for methods that distil both ways."""
        return None

    @property
    def weight(self) -> float:
        """λ of ``base + λ · KD``."""
        prefix = type(self).settings_type.__name__.removesuffix("Settings").lower()
        value: float = getattr(self.settings, f"{prefix}_weight")
        return value
