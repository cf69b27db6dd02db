r"""UnKD, unbiased knowledge distillation: pairs of about equally popular items.

The items are cut by popularity into G groups with about the same number of interactions each. From
each group a user gets a quota of pairs (a, b) of the teacher's top-P unseen items of this *group*,
where the teacher ranks a above b:

.. math:: \ell = \frac1n \sum_{(a,b)} \log\big(1 + e^{s_b - s_a}\big)

The two positions of a pair are drawn independently with :math:`p_r \propto e^{-r/T}`, and again if
they are the same. A teacher's bias towards popular items is a difference between groups, and no
pair contains two groups.

Source: Chen et al., Unbiased Knowledge Distillation for Recommendation, WSDM 2023. The port in
woriazzc/RCEKD @ 771322a does not run as published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recbole_rcekd.core.functional import at_least_float32
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates

# A group's ratio (least mean popularity / its own) is rounded to so many decimals, and at least so
# large.
_DECIMALS, _SMALLEST_SHARE = 2, 0.1


@dataclass(frozen=True)
class UnKDSettings(LossSettings):
    """Settings of UnKD; ``properties/loss/unkd.yaml`` documents each."""

    prefix = "unkd"

    unkd_weight: float = setting(1.0, low=0.0)
    unkd_groups: int = setting(4, low=1)
    unkd_pairs: int = setting(30, low=1)
    unkd_pool: int = setting(200, low=2)
    unkd_sampling_temperature: float = setting(20.0, above=0.0)
    unkd_quota_power: float = setting(0.0, low=0.0)

    def longest_list(self) -> tuple[str, ...]:
        """At least one item for each group; a short pool is enough."""
        return ("unkd_groups",)


def popularity_groups(popularity: Tensor, n_groups: int) -> Tensor:
    """The group of each item, ``[n_items]``; group 0 holds the most popular items.

    All groups have about the same number of interactions. An item belongs to the group in whose
    share of all interactions it begins, counted from the most popular item down. Items without
    interactions (and padding) belong to the last group. A group stays empty where one item has more
    than a group's share.
    """
    order = popularity.argsort(descending=True, stable=True)
    counts = popularity[order].long()
    before = counts.cumsum(0) - counts
    group = (before * n_groups // counts.sum().clamp(min=1)).clamp(max=n_groups - 1)
    return torch.empty_like(order).scatter_(0, order, group)


def quotas(
    popularity: Tensor, group: Tensor, n_groups: int, n_pairs: int, power: float
) -> list[int]:
    """How many of ``n_pairs`` each group gets: ∝ (least mean popularity / its mean popularity)^λ.

    They are rounded so that their sum is ``n_pairs``. Empty groups get none. A group without any
    interaction counts as popular as the least popular other group.
    """
    items, own = popularity[1:].double(), group[1:]
    counts = torch.bincount(own, minlength=n_groups)
    mean = torch.bincount(own, weights=items, minlength=n_groups) / counts.clamp(min=1)
    least = mean[mean > 0].min() if bool((mean > 0).any()) else mean.new_ones(())
    ratio = (
        (least / mean.clamp(min=float(least))).round(decimals=_DECIMALS).clamp(min=_SMALLEST_SHARE)
    )
    share = ratio**power * (counts > 0)
    exact = n_pairs * share / share.sum()
    whole = exact.floor()
    left = n_pairs - int(whole.sum())
    whole[(exact - whole).argsort(descending=True, stable=True)[:left]] += 1
    return [int(n) for n in whole]


def draw_pairs(weights: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` pairs of positions per row, with p(a, b) ∝ w_a·w_b and a ≠ b.

    This is the distribution of two independent draws that are repeated while they are the same.
    Here the first is drawn with p ∝ w_a·(Σw − w_a) and the second among the others, so that nothing
    is drawn again.

    Args:
        weights: ``[rows, P]``, at least 0.
        n: pairs per row.
        generator: the source of the draws.

    Returns:
        The smaller and the larger position, ``[rows, n]`` each. They are equal where a row has no
        two positions with a weight.
    """
    weights = weights.double()
    total = weights.sum(1, keepdim=True)
    shape = (2, len(weights), n)
    first_at, second_at = torch.rand(
        shape, generator=generator, dtype=torch.float64, device=weights.device
    )
    last = weights.shape[1] - 1
    firsts = (weights * (total - weights)).cumsum(1)
    first = torch.searchsorted(firsts, first_at * firsts[:, -1:], right=True).clamp_(max=last)
    ends = weights.cumsum(1)
    own = weights.gather(1, first)
    point = second_at * (total - own)
    # Points beyond the start of the first one's share move up by this share, which skips it.
    point += own * (point >= ends.gather(1, first) - own)
    second = torch.searchsorted(ends, point, right=True).clamp_(max=last)
    # Rounding may lead to an end of the row, to a position without weight.
    second = second.where((weights.gather(1, second) > 0) & (own > 0), first)
    return torch.minimum(first, second), torch.maximum(first, second)


class UnKDLoss(KDLoss):
    """UnKD. Training items are in no pair.

    The teacher's top-P of each group is computed once for each user and kept. This takes
    4 · ``unkd_groups`` · ``unkd_pool`` bytes per user.

    Example:
        Two pairs. The student scores the first pair equally, and prefers the wrong item of the
        second 3 : 1.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.unkd import UnKDLoss, UnKDSettings
        >>> loss = UnKDLoss(UnKDSettings(unkd_pairs=2))
        >>> sets = ItemSets(items=torch.tensor([[1, 3, 2, 4]]))  # the pairs (1, 2) and (3, 4)
        >>> student_scores = torch.tensor([[1.0, 1.0, 1.0, 3.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # (ln 2 + ln 4) / 2
        >>> round(value.item(), 4)
        1.0397
    """

    settings_type = UnKDSettings
    settings: UnKDSettings
    _pools: Tensor
    _known: Tensor

    def prepare(self, n_contexts: int, device: torch.device) -> None:
        """Make room for the teacher's top items of each user."""
        s = self.settings
        pools = torch.zeros(
            (n_contexts, s.unkd_groups, s.unkd_pool), dtype=torch.int32, device=device
        )
        self.register_buffer("_pools", pools, persistent=False)
        self.register_buffer(
            "_known", torch.zeros(n_contexts, dtype=torch.bool, device=device), persistent=False
        )
        self._group: Tensor | None = None
        self._quotas: list[int] = []

    def select(self, candidates: Candidates) -> ItemSets:
        """``[the better item of each pair (n) | the worse item (n)]``.

        Both are 0 where a group has fewer than two items for a user.
        """
        s = self.settings
        pools = self._pools_of(candidates)
        rank = torch.arange(1, s.unkd_pool + 1, dtype=torch.float64, device=pools.device)
        by_rank = torch.exp(-rank / s.unkd_sampling_temperature)
        better, worse = [], []
        for pool, n in zip(pools.unbind(1), self._quotas, strict=True):
            high, low = draw_pairs(by_rank * (pool != 0), n, candidates.generator)
            two = high != low
            better.append(pool.gather(1, high) * two)
            worse.append(pool.gather(1, low) * two)
        return ItemSets(torch.cat(better + worse, dim=1))

    def _pools_of(self, candidates: Candidates) -> Tensor:
        """The teacher's top-P unseen items of each group, ``[n, G, P]``; computed once."""
        s = self.settings
        if self._group is None:
            popularity = candidates.popularity()
            self._group = popularity_groups(popularity, s.unkd_groups)
            self._quotas = quotas(
                popularity, self._group, s.unkd_groups, s.unkd_pairs, s.unkd_quota_power
            )
        new = (~self._known[candidates.ids]).nonzero().squeeze(1)
        if len(new):
            part = candidates.part(new)
            found = part.teacher_top_of_groups(self._group, s.unkd_groups, s.unkd_pool)
            self._pools[part.ids] = found.int()
            self._known[part.ids] = True
        return self._pools[candidates.ids].long()

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """``softplus(s_worse − s_better)`` of each user, the mean over its pairs."""
        n = self.settings.unkd_pairs
        pairs = sets.items[:, :n] != 0
        scores = at_least_float32(student_scores)
        # Masked before, so that a masked score has no gradient, and after, since softplus(0) is not
        # 0.
        better, worse = (
            scores[:, :n].masked_fill(~pairs, 0.0),
            scores[:, n:].masked_fill(~pairs, 0.0),
        )
        return softplus(worse - better).masked_fill(~pairs, 0.0).sum(-1) / pairs.sum(-1).clamp(
            min=1
        )
