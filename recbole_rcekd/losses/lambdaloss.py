r"""LambdaLoss: pairs weighted by how much swapping them would change NDCG of the teacher's top-K.

.. math::
    \ell &= \sum_{i\in Q_T} \sum_{j:\, G_j < G_i}
    \frac{(G_i - G_j)\, \big|d(r_i) - d(r_j)\big|}{\mathrm{IDCG}}
    \, \log\big(1 + e^{-(s_i - s_j)}\big) \\
    d(r) &= \frac{1}{\log_2(1+r)}

with j in :math:`Q_T` or in the student's top-M. The gains G are the teacher's softmax on
:math:`Q_T`, and 0 elsewhere. IDCG is the DCG of :math:`Q_T` in the teacher's order. The ranks r are
the positions in the student's top-M when the candidates were made, and M + 1 for all other items;
the scores are those of the step.

Source: Wang et al., The LambdaLoss Framework for Ranking Metric Optimization, CIKM 2018, in its
LambdaRank form. To use a teacher's probabilities as labels is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recbole_rcekd.core.functional import at_least_float32, is_member, masked_softmax, positions_in
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class LambdaLossSettings(LossSettings):
    """Settings of LambdaLoss; ``properties/loss/lambdaloss.yaml`` documents each."""

    prefix = "lambdaloss"

    lambdaloss_weight: float = setting(10.0, low=0.0)
    lambdaloss_top_k: int = setting(20, low=1)
    lambdaloss_pool: int = setting(50, low=1)
    lambdaloss_temperature: float = setting(1.0, above=0.0)

    def longest_list(self) -> tuple[str, ...]:
        """The longer of top-K and top-M, which may be the same items."""
        return (
            max(("lambdaloss_top_k", "lambdaloss_pool"), key=lambda key: int(getattr(self, key))),
        )


class LambdaLossLoss(KDLoss):
    """LambdaLoss: the teacher's top-K against each other and against the student's top-M.

    Example:
        The student's top-2 is {3, 1}. The teacher's top-2 is {1, 2}, with gains 3/4 and 1/4. Item 2
        is not in the student's top-2, so it has rank 3. With equal scores each pair costs ln 2
        times its weight.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.lambdaloss import LambdaLossLoss, LambdaLossSettings
        >>> loss = LambdaLossLoss(LambdaLossSettings(lambdaloss_top_k=2, lambdaloss_pool=2))
        >>> sets = ItemSets(
        ...     items=torch.tensor([[3, 1, 1, 2]]),
        ...     teacher_scores=torch.tensor([[0.0, 0.0, 3.0, 1.0]]).log(),
        ... )
        >>> value = loss.forward(torch.zeros(1, 4), sets)
        >>> round(value.item(), 4)
        0.3568
    """

    settings_type = LambdaLossSettings
    settings: LambdaLossSettings

    def select(self, candidates: Candidates) -> ItemSets:
        """``[the student's top-M, best first | Q_T (K)]``.

        The teacher's scores are those of Q_T (−∞ elsewhere).
        """
        pool = candidates.student_top(self.settings.lambdaloss_pool)
        teacher_top = candidates.teacher_top(self.settings.lambdaloss_top_k)
        scores = torch.nn.functional.pad(
            candidates.teacher_scores(teacher_top), (pool.shape[1], 0), value=-torch.inf
        )
        return ItemSets(torch.cat([pool, teacher_top], dim=1), scores)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The sum over the pairs of each user; without targets it is 0.

        An item of both the student's top-M and Q_T counts once, as a target.
        """
        if sets.teacher_scores is None:
            raise ValueError("LambdaLossLoss needs teacher_scores; see LambdaLossLoss.select.")
        items, n_pool = sets.items.long(), sets.items.shape[1] - self.settings.lambdaloss_top_k
        pool, targets = items[:, :n_pool], items[:, n_pool:]
        listed = targets != 0
        counts = torch.cat([(pool != 0) & ~is_member(pool, targets), listed], dim=1)
        teacher = at_least_float32(sets.teacher_scores.detach())[:, n_pool:]
        gains = masked_softmax(teacher / self.settings.lambdaloss_temperature, listed)
        place = positions_in(targets, pool)
        own_places = torch.arange(n_pool, device=pool.device).expand_as(pool)
        above = torch.cat([own_places, place.masked_fill(place < 0, n_pool)], dim=1)
        discounts = (above + 2).to(gains.dtype).log2().reciprocal()
        best_first = torch.arange(2, gains.shape[1] + 2, device=gains.device).to(gains.dtype)
        ideal = (gains.sort(-1, descending=True).values / best_first.log2()).sum(-1)
        # [B, K, M + K]: each target over each item of less gain.
        others = torch.nn.functional.pad(gains, (n_pool, 0)).unsqueeze(1)
        weights = (gains.unsqueeze(2) - others).clamp(min=0.0) * counts.unsqueeze(1)
        weights = weights * (discounts[:, n_pool:].unsqueeze(2) - discounts.unsqueeze(1)).abs()
        scores = at_least_float32(student_scores).masked_fill(~counts, 0.0)
        pairs = softplus(scores.unsqueeze(1) - scores[:, n_pool:].unsqueeze(2))
        return (weights * pairs).sum((1, 2)) / ideal.clamp(min=torch.finfo(ideal.dtype).tiny)
