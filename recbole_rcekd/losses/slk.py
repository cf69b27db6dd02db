r"""SL@K for distillation: cross-entropy over the catalogue, weighted by whether an item is near the student's top K.

.. math:: \ell = \sum_{i\in Q_T} \sigma_{Q_T}(t/\tau)_i \; w_i \,
    \Big[\log\sum_{j\in I} e^{s_j/\tau} - s_i/\tau\Big], \qquad
    w_i = \sigma\big((s_i - \beta)/\tau_w\big)

with β the score of the student's K-th best item, the border of its top K. Of NDCG@K only what lies
above the border counts; w is a soft form of that: an item far below it, which no step will lift
into the top K, weighs little. The item at the border is looked up with the lists, its score in
every step. The weights are taken as constants.

Source: Breaking the Top-K Barrier (SL@K), KDD 2025, arXiv 2508.05673, for labels; a teacher's top
items and probabilities in their place are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_rcekd.core.full_softmax import catalogue_cross_entropy
from recbole_rcekd.core.functional import at_least_float32, masked_softmax
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class SLKSettings(LossSettings):
    """Settings of SL@K; ``properties/loss/slk.yaml`` gives type, purpose and source of each."""

    prefix = "slk"

    slk_weight: float = setting(10.0, low=0.0)
    slk_top_k: int = setting(50, low=1)
    slk_cut: int = setting(20, low=1)
    slk_cut_temperature: float = setting(1.0, above=0.0)
    slk_temperature: float = setting(1.0, above=0.0)

    def longest_list(self) -> tuple[str, ...]:
        """One list of the teacher; where fewer items than the student's cut can be listed, all are above it."""
        return ("slk_top_k",)


class SLKLoss(KDLoss):
    """Cross-entropy over the catalogue with the soft weights of SL@K.

    Relations: with all weights 1 it is :class:`~recbole_rcekd.losses.fce.FCELoss`
        (``fce_target: teacher``).
    """

    settings_type = SLKSettings
    settings: SLKSettings
    scores_all_items = True

    def select(self, lists: Candidates) -> ItemSets:
        """``[Q_T | the student's K-th best item]``; of the last there is no teacher score to learn (−∞)."""
        teacher_top = lists.teacher_top(self.settings.slk_top_k)
        border = lists.student_top(self.settings.slk_cut)[:, -1:]
        scores = lists.teacher_scores(teacher_top)
        no_target = torch.full_like(scores[:, :1], -torch.inf)
        return ItemSets(
            torch.cat([teacher_top, border], dim=1), torch.cat([scores, no_target], dim=1)
        )

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Per row; ``student_scores [B, N]``, column 0 is padding. Without a list of the teacher the loss is 0."""
        if sets.teacher_scores is None:
            raise ValueError("SLKLoss needs teacher_scores; see SLKLoss.select.")
        s, scores = self.settings, at_least_float32(student_scores)
        listed = scores.detach().gather(1, sets.items.long())
        keep = sets.items[:, :-1] != 0
        # A border that is not there (fewer items than the cut) lies below everything.
        border = listed[:, -1:].masked_fill(sets.items[:, -1:] == 0, -torch.inf)
        listed = listed[:, :-1].masked_fill(~keep, 0.0)
        weight = torch.sigmoid((listed - border) / s.slk_cut_temperature)
        teacher = at_least_float32(sets.teacher_scores.detach())[:, :-1]
        target = masked_softmax(teacher / s.slk_temperature, keep)
        return catalogue_cross_entropy(
            scores, sets.items[:, :-1], target * weight, s.slk_temperature
        )
