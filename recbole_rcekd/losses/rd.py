r"""RD, ranking distillation: the teacher's top items as positives, weighted by the student's error.

.. math:: \ell = \sum_{r=0}^{K-1} w_r \log(1+e^{-s_{\pi_r}}), \qquad
    a_r = \frac{e^{-r/\lambda_p}}{\sum_{r'} e^{-r'/\lambda_p}}, \qquad
    b_r = \max\big(0, \tanh(\mu(\hat r_r - r))\big)

with π the teacher's top-K unseen items. The student's rank
:math:`\hat r = \lfloor (N-1)\,f \rfloor` is estimated in each step: f is the share of n random
unseen items that the student scores higher. :math:`w = a` before ``rd_start_epoch``, and
:math:`w = a\,b` from then on. No gradient is taken of w.

Source: Tang & Wang, Ranking Distillation, KDD 2018; ``rd_weights: port`` is woriazzc/RCEKD @
771322a, which counts :math:`\hat r` from 1 and divides :math:`a\,b` by its sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recbole_rcekd.core.functional import at_least_float32, count_above, masked_log_softmax
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates

# A whole rank must not be rounded to the one below it in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class RDSettings(LossSettings):
    """Settings of RD; ``properties/loss/rd.yaml`` documents each."""

    prefix = "rd"

    rd_weight: float = setting(1.0, low=0.0)
    rd_top_k: int = setting(10, low=1)
    rd_samples: int = setting(100, low=1)
    rd_position_scale: float = setting(1.0, above=0.0)
    rd_mu: float = setting(0.1, above=0.0)
    rd_start_epoch: int = setting(10, low=0)
    rd_weights: Literal["original", "port"] = "original"

    def longest_list(self) -> tuple[str, ...]:
        """Fewer samples than asked for are enough."""
        return ("rd_top_k",)


class RDLoss(KDLoss):
    """RD. Training items are left out.

    Samples may be among the teacher's items, as in the authors' code.

    Example:
        Two items of the teacher with position weights 0.7311 and 0.2689, and two samples. Of 21
        items, each sample stands for 20/2 = 10. Both samples are above the first item (rank 20,
        should be 0), one is above the second (rank 10, should be 1).

        >>> import math
        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.rd import RDLoss, RDSettings
        >>> loss = RDLoss(RDSettings(rd_top_k=2, rd_samples=2))
        >>> sets = ItemSets(
        ...     items=torch.tensor([[4, 9, 2, 7]]),
        ...     keep=torch.ones(1, 4, dtype=torch.bool),
        ...     gamma=torch.ones(1),  # 1: the student's ranks count; 0: position weights only
        ...     log_tail=torch.tensor([math.log(20 / 2)]),
        ... )
        >>> student_scores = torch.tensor([[0.0, 1.1, 0.5, 2.0]])
        >>> value = loss.forward(student_scores, sets)
        >>> round(value.item(), 4)
        0.5439
    """

    settings_type = RDSettings
    settings: RDSettings

    def select(self, candidates: Candidates) -> ItemSets:
        """``[teacher's top-K | n samples]``; γ is 1 if the student's ranks count, else 0."""
        s = self.settings
        head = candidates.teacher_top(s.rd_top_k, unseen=True)
        tail = candidates.draw_unseen(s.rd_samples, outside=head[:, :0])
        tail = tail.masked_fill(head[:, :1] == 0, 0)  # users for whom the teacher lists nothing
        items = torch.cat([head, tail], dim=1)
        found = (tail != 0).sum(1).clamp(min=1)
        return ItemSets(
            items,
            keep=items != 0,
            gamma=torch.full_like(found, candidates.epoch >= s.rd_start_epoch, dtype=torch.float32),
            # N − 1 other items, without padding.
            log_tail=(max(1, candidates.n_items - 2) / found).log(),
        )

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """``Σ_r w_r · softplus(−s_r)`` of each user."""
        if sets.keep is None or sets.gamma is None or sets.log_tail is None:
            raise ValueError("RDLoss needs keep, gamma and log_tail; see RDLoss.select.")
        k = sets.items.shape[1] - self.settings.rd_samples
        # Masked before, so that a masked score has no gradient.
        scores = at_least_float32(student_scores)
        head = scores[:, :k].masked_fill(~sets.keep[:, :k], 0.0)
        samples = scores[:, k:].detach().masked_fill(~sets.keep[:, k:], -torch.inf)
        weights = self._weights(head.detach(), samples, sets.keep[:, :k], sets.gamma, sets.log_tail)
        return (weights * softplus(-head)).sum(-1)

    def _weights(
        self, head: Tensor, samples: Tensor, keep: Tensor, gamma: Tensor, log_tail: Tensor
    ) -> Tensor:
        """The weights w, ``[B, K]``; 0 for masked items."""
        s = self.settings
        rank = (keep.cumsum(1) - 1).to(head.dtype)
        by_position = masked_log_softmax(-rank / s.rd_position_scale, keep).exp() * keep
        each = log_tail.to(head.dtype).exp().unsqueeze(1)
        student_rank = torch.floor(count_above(head, samples) * each * (1.0 + _ROUNDING))
        if s.rd_weights == "port":
            student_rank = student_rank + 1.0
        by_both = by_position * torch.tanh(s.rd_mu * (student_rank - rank)).clamp(min=0.0)
        if s.rd_weights == "port":
            by_both = by_both / by_both.sum(1, keepdim=True).clamp(min=torch.finfo(head.dtype).tiny)
        # A NaN is above nothing, but it should show in the loss.
        by_both = by_both.masked_fill(samples.isnan().any(1, keepdim=True), torch.nan)
        return by_both.where(gamma.unsqueeze(1) > 0, by_position)
