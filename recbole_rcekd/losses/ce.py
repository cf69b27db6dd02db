r"""Cross-entropy on the teacher's top-K, the student's, or their union.

.. math:: \ell = -\sum_{i\in J} \sigma_J(t/\tau)_i \, \log \sigma_J(s/\tau)_i, \qquad
    J = Q_T,\ Q_S \text{ or } Q_T\cup Q_S

On :math:`Q_T` this is "vanilla CE" ("KD" in the authors' code), the method that RCE-KD improves:
nothing in it pushes down what the student ranks above :math:`Q_T`. :math:`Q_S` is closed, but the
student does not learn about the items of :math:`Q_T` that it misses.

Where a teacher lists fewer than K items, the missing ones are masked. For a user without any, the
loss is 0.

Source: RCE-KD, ICLR 2026, section 5 and figure 3; authors' code woriazzc/RCEKD @ 771322a (class
``KD``, ``kd_guide: teacher | student``). The union was asked for by a reviewer of that paper.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from recbole_rcekd.core.functional import is_member, soft_cross_entropy
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class CESettings(LossSettings):
    """Settings of CE on a top-K; ``properties/loss/ce.yaml`` documents each."""

    prefix = "ce"

    ce_weight: float = setting(10.0, low=0.0)
    ce_top_k: int = setting(50, low=1)
    ce_temperature: float = setting(1.0, above=0.0)
    ce_items: Literal["teacher", "student", "union"] = "teacher"

    def longest_list(self) -> tuple[str, ...]:
        """One top-K."""
        return ("ce_top_k",)


class CELoss(KDLoss):
    """Cross-entropy on the teacher's top-K, the student's top-K, or their union.

    Relations: :class:`~recbole_rcekd.losses.fce.FCELoss` is the same over all items.

    Example:
        The teacher prefers the first of two items 3 : 1, the student 1 : 3.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.ce import CELoss, CESettings
        >>> loss = CELoss(CESettings())
        >>> sets = ItemSets(
        ...     items=torch.tensor([[5, 7]]), teacher_scores=torch.tensor([[3.0, 1.0]]).log()
        ... )
        >>> student_scores = torch.tensor([[1.0, 3.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # 3/4 ln 4 + 1/4 ln 4/3
        >>> round(value.item(), 4)
        1.1116
    """

    settings_type = CESettings
    settings: CESettings

    def __init__(self, settings: CESettings) -> None:
        super().__init__(settings)
        self.renewed = settings.ce_items != "teacher"
        self.temperature = settings.ce_temperature

    def select(self, candidates: Candidates) -> ItemSets:
        """``[Q_T]``, ``[Q_S]`` or ``[Q_T | Q_S]``, each item counted once."""
        k, which = self.settings.ce_top_k, self.settings.ce_items
        if which == "teacher":
            return self._sets(candidates.teacher_top(k), candidates)
        student_top = candidates.student_top(k)
        if which == "student":
            return self._sets(student_top, candidates)
        teacher_top = candidates.teacher_top(k)
        shared = is_member(student_top, teacher_top)
        sets = self._sets(torch.cat([teacher_top, student_top], dim=1), candidates)
        once = torch.cat([torch.ones_like(shared), ~shared], dim=1) & cast(Tensor, sets.keep)
        overlap = shared.sum(1) / (teacher_top != 0).sum(1).clamp(min=1)
        return dataclasses.replace(sets, keep=once, overlap=overlap)

    def _sets(self, items: Tensor, candidates: Candidates) -> ItemSets:
        scores = candidates.teacher_scores(items)
        return ItemSets(items, scores, (items != 0) & (scores != -torch.inf))

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Soft cross-entropy of each user."""
        if sets.teacher_scores is None:
            raise ValueError("CELoss needs teacher_scores; see CELoss.select.")
        return soft_cross_entropy(student_scores, sets.teacher_scores, sets.keep, self.temperature)

    def closure_sets(self, sets: ItemSets) -> tuple[ItemSets, ItemSets]:
        """The items are both targets and normaliser."""
        return sets, sets
