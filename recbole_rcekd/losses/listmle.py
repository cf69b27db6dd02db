r"""ListMLE: the likelihood of the teacher's order of its top-K, under the student.

.. math:: \ell = \sum_{k=1}^{K} \Big[\log\sum_{k'\ge k} e^{s_{\pi_{k'}}} - s_{\pi_k}\Big]

with π the teacher's top-K, best first. The Plackett–Luce model picks these items one by one in this
order. Only the order counts: not how far apart the teacher's scores are, and not where the other
items rank.

Source: Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008. To take
a teacher's top-K as the truth is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recbole_rcekd.core.functional import plackett_luce
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class ListMLESettings(LossSettings):
    """Settings of ListMLE; ``properties/loss/listmle.yaml`` documents each."""

    prefix = "listmle"

    listmle_weight: float = setting(0.01, low=0.0)
    listmle_top_k: int = setting(50, low=2)

    def longest_list(self) -> tuple[str, ...]:
        """One top-K."""
        return ("listmle_top_k",)


class ListMLELoss(KDLoss):
    """ListMLE on the teacher's top-K.

    Relations: :class:`~recbole_rcekd.losses.rrd.RRDLoss` has other items below the top-K.
    :class:`~recbole_rcekd.losses.ce.CELoss` learns the teacher's probabilities of the top-K instead
    of its order.

    Example:
        The student picks three items with odds 2 : 1 : 5. The teacher wants them in this order.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.listmle import ListMLELoss, ListMLESettings
        >>> loss = ListMLELoss(ListMLESettings(listmle_top_k=3))
        >>> items = torch.tensor([[4, 9, 2]])
        >>> sets = ItemSets(items, keep=items != 0)
        >>> student_scores = torch.tensor([[2.0, 1.0, 5.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # −ln(2/8 · 1/6)
        >>> round(value.item(), 4)
        3.1781
    """

    settings_type = ListMLESettings
    settings: ListMLESettings
    renewed = False

    def select(self, candidates: Candidates) -> ItemSets:
        """The teacher's top-K, best first."""
        items = candidates.teacher_top(self.settings.listmle_top_k)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood of each user.

        A single item has no order, and a loss of 0.
        """
        return plackett_luce(student_scores, student_scores[..., :0], sets.keep)
