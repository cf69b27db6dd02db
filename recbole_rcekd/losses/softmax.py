r"""Softmax, a control: the student alone, with a softmax over all items instead of its own loss.

.. math:: \ell = \log\sum_{j\in I} e^{s_j/\tau} - \frac{1}{|P|} \sum_{i\in P} s_i/\tau

P are training items of the user, up to n drawn at random; for a row of a sequence it is the next
item. There is no teacher. If distillation improves a student that has a pairwise loss of its own,
the reason may be the normaliser over all items; this control shows how much of it is.

Source: softmax cross-entropy of labels, as in Bruch et al., ICTIR 2019, where it bounds NDCG. To
use it as a control is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recbole_rcekd.core.full_softmax import catalogue_cross_entropy
from recbole_rcekd.core.functional import at_least_float32
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class SoftmaxSettings(LossSettings):
    """Settings of the softmax control; ``properties/loss/softmax.yaml`` documents each."""

    prefix = "softmax"

    softmax_weight: float = setting(1.0, above=0.0)
    softmax_positives: int = setting(20, low=1)
    softmax_temperature: float = setting(1.0, above=0.0)


class SoftmaxLoss(KDLoss):
    """Cross-entropy of training items over all items, in place of the model's own loss.

    Relations: :class:`~recbole_rcekd.losses.fce.FCELoss` with labels instead of a teacher.

    Example:
        Three items, with the student's probabilities 1/5, 3/5 and 1/5. Items 1 and 2 are training
        items.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.softmax import SoftmaxLoss, SoftmaxSettings
        >>> loss = SoftmaxLoss(SoftmaxSettings())
        >>> sets = ItemSets(items=torch.tensor([[1, 2]]))
        >>> student_scores = torch.tensor([[0.0, 1.0, 3.0, 1.0]]).log()  # column 0 is no item
        >>> value = loss.forward(student_scores, sets)  # 1/2 ln 5 + 1/2 ln 5/3
        >>> round(value.item(), 4)
        1.0601
    """

    settings_type = SoftmaxSettings
    settings: SoftmaxSettings
    needs_teacher = False
    replaces_base = True
    scores_all_items = True

    def select(self, candidates: Candidates) -> ItemSets:
        """Up to n training items, 0 where there are fewer."""
        return ItemSets(candidates.positives(self.settings.softmax_positives))

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The loss of each user; 0 for a user without training items.

        Args:
            student_scores: ``[B, N]``, column 0 is padding.
            sets: what :meth:`select` chose.
        """
        keep = sets.items != 0
        weights = keep / keep.sum(-1, keepdim=True).clamp(min=1)
        return catalogue_cross_entropy(
            at_least_float32(student_scores), sets.items, weights, self.settings.softmax_temperature
        )
