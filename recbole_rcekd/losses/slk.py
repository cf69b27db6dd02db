r"""SL@K for distillation: cross-entropy over all items, weighted around the student's top K.

.. math:: \ell = \sum_{i\in Q_T} \sigma_{Q_T}(t/\tau)_i \; w_i \,
    \Big[\log\sum_{j\in I} e^{s_j/\tau} - s_i/\tau\Big], \qquad
    w_i = \sigma\big((s_i - \beta)/\tau_w\big)

β is the score of the student's K-th best item, the border of its top K. For NDCG@K only items above
the border count. The weight w is a soft form of that: an item far below the border weighs little.
The item at the border is looked up when the candidates are made, its score in every step. No
gradient is taken of the weights.

Source: Breaking the Top-K Barrier (SL@K), KDD 2025, arXiv 2508.05673, for labels. To take a
teacher's top items and probabilities in their place is ours.
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
    """Settings of SL@K; ``properties/loss/slk.yaml`` documents each."""

    prefix = "slk"

    slk_weight: float = setting(10.0, low=0.0)
    slk_top_k: int = setting(50, low=1)
    slk_cut: int = setting(20, low=1)
    slk_cut_temperature: float = setting(1.0, above=0.0)
    slk_temperature: float = setting(1.0, above=0.0)

    def longest_list(self) -> tuple[str, ...]:
        """One top-K of the teacher.

        The student's cut may be longer than the catalogue: then all items are above it.
        """
        return ("slk_top_k",)


class SLKLoss(KDLoss):
    """Cross-entropy over all items with the soft weights of SL@K.

    Relations: with all weights 1 it is :class:`~recbole_rcekd.losses.fce.FCELoss` with
    ``fce_target: teacher``.

    Example:
        Three items, with the student's probabilities 1/5, 3/5 and 1/5. The teacher's top-2 are the
        items 2 and 1, with probabilities 3/4 and 1/4. Item 2 is at the border, so the weights are
        1/2 and 1/4.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.slk import SLKLoss, SLKSettings
        >>> loss = SLKLoss(SLKSettings())
        >>> sets = ItemSets(
        ...     items=torch.tensor([[2, 1, 2]]),  # Q_T, and the item at the border
        ...     teacher_scores=torch.tensor([[3.0, 1.0, 0.0]]).log(),
        ... )
        >>> student_scores = torch.tensor([[0.0, 1.0, 3.0, 1.0]]).log()  # column 0 is no item
        >>> value = loss.forward(student_scores, sets)  # 3/4 · 1/2 ln 5/3 + 1/4 · 1/4 ln 5
        >>> round(value.item(), 4)
        0.2921
    """

    settings_type = SLKSettings
    settings: SLKSettings
    scores_all_items = True

    def select(self, candidates: Candidates) -> ItemSets:
        """``[Q_T | the student's K-th best item]``.

        The last column is no target: its teacher score is −∞.
        """
        teacher_top = candidates.teacher_top(self.settings.slk_top_k)
        border = candidates.student_top(self.settings.slk_cut)[:, -1:]
        scores = candidates.teacher_scores(teacher_top)
        no_target = torch.full_like(scores[:, :1], -torch.inf)
        return ItemSets(
            torch.cat([teacher_top, border], dim=1), torch.cat([scores, no_target], dim=1)
        )

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The loss of each user; 0 for a user without items of the teacher.

        Args:
            student_scores: ``[B, N]``, column 0 is padding.
            sets: what :meth:`select` chose.
        """
        if sets.teacher_scores is None:
            raise ValueError("SLKLoss needs teacher_scores; see SLKLoss.select.")
        s, scores = self.settings, at_least_float32(student_scores)
        listed = scores.detach().gather(1, sets.items.long())
        keep = sets.items[:, :-1] != 0
        # If there are fewer items than the cut, the border lies below all of them.
        border = listed[:, -1:].masked_fill(sets.items[:, -1:] == 0, -torch.inf)
        listed = listed[:, :-1].masked_fill(~keep, 0.0)
        weight = torch.sigmoid((listed - border) / s.slk_cut_temperature)
        teacher = at_least_float32(sets.teacher_scores.detach())[:, :-1]
        target = masked_softmax(teacher / s.slk_temperature, keep)
        return catalogue_cross_entropy(
            scores, sets.items[:, :-1], target * weight, s.slk_temperature
        )
