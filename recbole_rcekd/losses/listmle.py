r"""ListMLE: the likelihood of the teacher's order of its top-K, under the student.

.. math:: \ell = \sum_{k=1}^{K} \Big[\log\sum_{k'\ge k} e^{s_{\pi_{k'}}} - s_{\pi_k}\Big]

with π the teacher's top-K, best first: the Plackett–Luce model picks them one by one in this order.
Nothing but the order counts: not how far apart the teacher's scores are, and not where the other
items stand.

Source: Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008. Taking a
teacher's list for the truth is ours.
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
    """Settings of ListMLE; ``properties/loss/listmle.yaml`` gives type, purpose and source of each."""

    prefix = "listmle"

    listmle_weight: float = setting(0.01, low=0.0)
    listmle_top_k: int = setting(50, low=2)

    def longest_list(self) -> tuple[str, ...]:
        """One list of K."""
        return ("listmle_top_k",)


class ListMLELoss(KDLoss):
    """ListMLE on the teacher's top-K.

    Relations: :class:`~recbole_rcekd.losses.rrd.RRDLoss` has a tail of other items below the list,
        and
    :class:`~recbole_rcekd.losses.ce.CELoss` learns the teacher's probabilities on the same list
      instead of its order.
    """

    settings_type = ListMLESettings
    settings: ListMLESettings
    renewed = False

    def select(self, lists: Candidates) -> ItemSets:
        """The teacher's top-K, best first."""
        items = lists.teacher_top(self.settings.listmle_top_k)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood per row; a list of one item has no order, and a loss of 0."""
        return plackett_luce(student_scores, student_scores[..., :0], sets.keep)
