r"""Softmax: a control. The student alone, with a softmax over the catalogue on its training items instead of its own loss.

.. math:: \ell = \log\sum_{j\in I} e^{s_j/\tau} - \frac{1}{|P|} \sum_{i\in P} s_i/\tau

P: training items of the user, up to n drawn at random; of a row of a sequence its target. No
teacher is asked. What a method of distillation gains over a student with a pairwise loss may be the
gain of a normaliser over all items: this tells.

Source: softmax cross-entropy of labels, as in Bruch et al., ICTIR 2019, where it bounds NDCG; as a
    control, ours.
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
    """Settings of the softmax control; ``properties/loss/softmax.yaml`` gives type, purpose and source of each."""

    prefix = "softmax"

    softmax_weight: float = setting(1.0, above=0.0)
    softmax_positives: int = setting(20, low=1)
    softmax_temperature: float = setting(1.0, above=0.0)


class SoftmaxLoss(KDLoss):
    """Cross-entropy of training items over the catalogue, in the place of the model's own loss.

    Relations: :class:`~recbole_rcekd.losses.fce.FCELoss` with labels for a teacher.
    """

    settings_type = SoftmaxSettings
    settings: SoftmaxSettings
    needs_teacher = False
    replaces_base = True
    scores_all_items = True

    def select(self, lists: Candidates) -> ItemSets:
        """Up to n training items, 0 where there are fewer."""
        return ItemSets(lists.positives(self.settings.softmax_positives))

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Per row; ``student_scores [B, N]``, column 0 is padding. Without a training item the loss is 0."""
        keep = sets.items != 0
        weights = keep / keep.sum(-1, keepdim=True).clamp(min=1)
        return catalogue_cross_entropy(
            at_least_float32(student_scores), sets.items, weights, self.settings.softmax_temperature
        )
