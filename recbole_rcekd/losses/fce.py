r"""Cross-entropy over the whole catalogue, with the teacher's opinion of all items or of its top-K.

.. math::
    \text{all:}     &\quad \ell = \log\sum_{j\in I} e^{s_j/\tau} - \sum_{i\in I} \sigma_I(t/\tau)_i\, s_i/\tau \\
    \text{teacher:} &\quad \ell = \log\sum_{j\in I} e^{s_j/\tau} - \sum_{i\in Q_T} \sigma_{Q_T}(t/\tau)_i\, s_i/\tau

Both are unconditional bounds: the first on NDCG with all items as targets (theorem 4.1 of the paper), the second on
NDCG of :math:`Q_T`, with no closure assumption (T3 of METHODS.md with A = I; ours, not in the paper). The price is one
score per user and *item* in every step. Of whom the teacher says nothing, the loss is 0.

Source: RCE-KD, ICLR 2026, section 4.1 ("full-CE" in figure 3) for ``all``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recbole_rcekd.functional import at_least_float32, soft_cross_entropy
from recbole_rcekd.item_sets import Lists
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.settings import LossSettings, setting
from recbole_rcekd.types import ItemSets


@dataclass(frozen=True)
class FCESettings(LossSettings):
    """Settings of full-catalogue CE; ``properties/loss/fce.yaml`` gives type, purpose and source of each."""

    fce_weight: float = setting(10.0, low=0.0)
    fce_target: Literal["all", "teacher"] = "teacher"
    fce_top_k: int = setting(50, low=1)
    fce_temperature: float = setting(1.0, above=0.0)

    def longest_list(self) -> tuple[str, ...]:
        """One list of K, where there is one."""
        return ("fce_top_k",) if self.fce_target == "teacher" else ()


class FCELoss(KDLoss):
    """Cross-entropy whose normaliser runs over all items.

    Relations: with ``fce_target: all`` the limit of :class:`~recbole_rcekd.losses.ce.CELoss` for K = all items.
    """

    settings_type = FCESettings
    settings: FCESettings
    renewed = False
    scores_all_items = True

    def __init__(self, settings: FCESettings) -> None:
        super().__init__(settings)
        self.teaches_all_items = settings.fce_target == "all"

    def select(self, lists: Lists) -> ItemSets:
        """The teacher's top-K with its scores; nothing has to be chosen when all items are targets."""
        if self.teaches_all_items:
            return ItemSets(torch.zeros((len(lists.contexts), 0), dtype=torch.int64, device=lists.contexts.device))
        items = lists.teacher_top(self.settings.fce_top_k)
        return ItemSets(items, lists.teacher_scores(items))

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Per row; ``student_scores [B, N]`` and, for ``all``, ``sets.teacher_scores [B, N]``; column 0 is padding."""
        if sets.teacher_scores is None:
            raise ValueError("FCELoss needs teacher_scores; see FCELoss.select.")
        tau = self.settings.fce_temperature
        catalogue = student_scores[:, 1:]
        if self.teaches_all_items:
            # −inf: hidden from a row, or a whole row of whom the teacher says nothing.
            taught = sets.teacher_scores[:, 1:] != -torch.inf
            return soft_cross_entropy(catalogue, sets.teacher_scores[:, 1:], None if taught.all() else taught, tau)
        keep = sets.items != 0
        target = (sets.teacher_scores.detach() / tau).masked_fill(~keep, torch.finfo(sets.teacher_scores.dtype).min)
        listed = at_least_float32(student_scores).gather(1, sets.items.long()).masked_fill(~keep, 0.0) / tau
        loss = (at_least_float32(catalogue) / tau).logsumexp(-1) - (target.softmax(-1) * listed).sum(-1)
        return loss.where(keep.any(1), 0.0)
