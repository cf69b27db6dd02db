r"""RRD, relaxed ranking distillation: the teacher's order at the top, and all other items below.

.. math:: \ell = \sum_{k=1}^{K}
    \Big[\log\Big(\sum_{k'\ge k} e^{s_{\pi_{k'}}} + \sum_{l\in\text{rest}} e^{s_l}\Big)
    - s_{\pi_k}\Big]

with π the "interesting" items in the teacher's order, and the rest the "uninteresting" ones.
Interesting: K of the teacher's top-P unseen items, drawn without replacement with
:math:`p_r\propto e^{-r/T}`. Uninteresting: L items drawn uniformly from those that are neither seen
nor in this top-P. ``rrd_sample: False`` takes the first K and, as the rest, the next L instead; the
HetComp authors report that this is better. ``rrd_item_weight`` adds the item side of IR-RRD: the
same for each item, over users.

Source: Kang et al., DE-RRD, CIKM 2020; IR-RRD, Information Sciences 2021; woriazzc/RCEKD @ 771322a.
One deviation: the scores are not cut at 80. The log-space form does not need it, and it stops
gradients.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_rcekd.core.functional import draw_without_replacement, plackett_luce
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class RRDSettings(LossSettings):
    """Settings of RRD; ``properties/loss/rrd.yaml`` documents each."""

    prefix = "rrd"

    rrd_weight: float = setting(0.01, low=0.0)
    rrd_top_k: int = setting(50, low=1)
    rrd_rest: int = setting(100, low=1)
    rrd_pool: int = setting(500, low=1)
    rrd_sampling_temperature: float = setting(10.0, above=0.0)
    rrd_sample: bool = True
    rrd_item_weight: float = setting(0.0, low=0.0)

    def longest_list(self) -> tuple[str, ...]:
        """A short catalogue shortens the pool, but not these two."""
        return ("rrd_top_k", "rrd_rest")


class RRDLoss(KDLoss):
    """RRD and, with ``rrd_item_weight`` above 0, IR-RRD. Training items are left out.

    Example:
        Items 1 and 2 are interesting, 3 and 4 are not. The student picks item 1 first with
        probability 3/6, then item 2 with probability 1/3.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.rrd import RRDLoss, RRDSettings
        >>> loss = RRDLoss(RRDSettings(rrd_top_k=2, rrd_rest=2))
        >>> items = torch.tensor([[1, 2, 3, 4]])
        >>> sets = ItemSets(items, keep=items != 0)
        >>> student_scores = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # −ln(3/6 · 1/3)
        >>> round(value.item(), 4)
        1.7918
    """

    settings_type = RRDSettings
    settings: RRDSettings

    def __init__(self, settings: RRDSettings) -> None:
        super().__init__(settings)
        self.renewed = settings.rrd_sample

    def select(self, candidates: Candidates) -> ItemSets:
        """``[interesting (K), in the teacher's order | uninteresting (L)]``.

        Where a user has fewer items, the others are 0 and masked.
        """
        s = self.settings
        if not s.rrd_sample:
            items = candidates.teacher_top(s.rrd_top_k + s.rrd_rest, unseen=True)
            # The item side may have fewer users than that. Padding keeps the width of the head.
            items = torch.nn.functional.pad(items, (0, s.rrd_top_k + s.rrd_rest - items.shape[1]))
            return ItemSets(items, keep=items != 0)
        pool = candidates.teacher_top(s.rrd_pool, unseen=True)
        rank = torch.arange(1, pool.shape[1] + 1, device=pool.device)
        # If few items are unseen, the pool is cut (not below K) to leave L items for the rest.
        longest = (candidates.n_unseen().unsqueeze(1) - s.rrd_rest).clamp(min=s.rrd_top_k)
        pool = pool.masked_fill(rank > longest, 0)
        log_weights = (-rank / s.rrd_sampling_temperature).masked_fill(pool == 0, -torch.inf)
        drawn = draw_without_replacement(
            log_weights, min(s.rrd_top_k, pool.shape[1]), candidates.generator
        )
        head = pool.gather(1, drawn.sort(1).values)
        tail = candidates.draw_unseen(s.rrd_rest, outside=pool)
        items = torch.cat([head, tail], dim=1)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood of each user, summed over K items."""
        if sets.keep is None:
            raise ValueError("RRDLoss needs keep; see RRDLoss.select.")
        k = sets.items.shape[1] - self.settings.rrd_rest
        return plackett_luce(
            student_scores[:, :k], student_scores[:, k:], sets.keep[:, :k], sets.keep[:, k:]
        )

    def item_side(self) -> tuple[KDLoss, float] | None:
        """The same loss over users for each item."""
        if self.settings.rrd_item_weight == 0.0:
            return None
        return RRDLoss(
            dataclasses.replace(self.settings, rrd_item_weight=0.0)
        ), self.settings.rrd_item_weight
