r"""DCD, dual correction distillation: teach where the student errs within the teacher's list, in both directions.

Within the teacher's top-P unseen items, ρ_T is an item's place and ρ_S its place by the student's
scores:

.. math:: e^+ = \tanh\big(\max(0, (\rho_S-\rho_T)/T)\big), \qquad e^- = \tanh\big(\max(0, (\rho_T-\rho_S)/T)\big)

n under-estimated items, drawn ∝ e⁺ and put in the teacher's order, are the head π of a
Plackett–Luce likelihood; n over-estimated ones, drawn ∝ e⁻, are the rest that should lie below:

.. math:: \ell = \sum_{k=1}^{n}
    \Big[\log\Big(\sum_{k'\ge k} e^{s_{\pi_{k'}}} + \sum_{l\in\text{rest}} e^{s_l}\Big) - s_{\pi_k}\Big]

``dcd_item_weight`` weighs the item side (ICD), the same for each item over users, against this one
(UCD).

Source: Lee & Kim, Dual Correction Strategy for Ranking Distillation in Top-N Recommender System,
CIKM 2021. The RCE-KD authors' port differs so much that it is a loss of its own, :mod:`.dcd_port`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.functional import draw_without_replacement, plackett_luce
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class DCDSettings(LossSettings):
    """Settings of DCD; ``properties/loss/dcd.yaml`` gives type, purpose and source of each."""

    prefix = "dcd"

    dcd_weight: float = setting(0.01, low=0.0)
    dcd_items: int = setting(50, low=1)
    dcd_pool: int = setting(500, low=1)
    dcd_temperature: float = setting(10.0, above=0.0)
    dcd_item_weight: float = setting(1.0, low=0.0)

    def check_relations(self) -> None:
        """The items come out of the pool.

        Raises:
            SettingsError: they are more than it holds.
        """
        if self.dcd_items > self.dcd_pool:
            raise SettingsError(
                f"[dcd_items]={self.dcd_items} is larger than [dcd_pool]={self.dcd_pool}, the list "
                "they are drawn from. Raise dcd_pool or lower dcd_items."
            )

    def longest_list(self) -> tuple[str, ...]:
        """A short catalogue shortens the pool."""
        return ("dcd_items",)


def corrections(student_rank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """e⁺ and e⁻ ``[n, P]``: how far the student puts the items of a list below, and above, their places in it.

    Args:
        student_rank: its ranks of them, from 0, ``[n, P]``.
        temperature: T, in places.
    """
    gap = (
        student_rank - torch.arange(student_rank.shape[1], device=student_rank.device)
    ) / temperature
    return gap.clamp(min=0.0).tanh(), (-gap).clamp(min=0.0).tanh()


def drawn_items(
    pool: Tensor, weights: Tensor, n: int, generator: torch.Generator, in_order: bool
) -> Tensor:
    """``n`` items of each row of ``pool [rows, P]``, drawn without replacement with p ∝ weights, ``[rows, n]``.

    In the pool's order, or in that of the draw; where fewer than ``n`` have a weight, 0 after
    those.
    """
    place = draw_without_replacement(weights.log(), min(n, pool.shape[1]), generator)
    place = place.masked_fill(weights.gather(1, place) == 0, pool.shape[1])
    if in_order:
        place = place.sort(1).values
    items = torch.nn.functional.pad(pool, (0, 1)).gather(1, place)
    return torch.nn.functional.pad(items, (0, n - items.shape[1]))


class DCDLoss(KDLoss):
    """DCD, with the item side unless ``dcd_item_weight`` is 0. Training positives are in neither list."""

    settings_type = DCDSettings
    settings: DCDSettings

    def select(self, lists: Candidates) -> ItemSets:
        """``[under-estimated (n), in teacher order | over-estimated (n)]``; 0 and masked where there are fewer."""
        s = self.settings
        pool = lists.teacher_top(s.dcd_pool, unseen=True)
        scores = lists.student_scores(pool).masked_fill(pool == 0, -torch.inf)
        # Equal scores keep the teacher's order, which is then right.
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        under, over = corrections(rank, s.dcd_temperature)
        head = drawn_items(pool, under, s.dcd_items, lists.generator, in_order=True)
        tail = drawn_items(pool, over, s.dcd_items, lists.generator, in_order=False)
        items = torch.cat([head, tail], dim=1)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood per row, summed over the under-estimated items."""
        if sets.keep is None:
            raise ValueError("DCDLoss needs keep; see DCDLoss.select.")
        k = sets.items.shape[1] - self.settings.dcd_items
        return plackett_luce(
            student_scores[:, :k], student_scores[:, k:], sets.keep[:, :k], sets.keep[:, k:]
        )

    def item_side(self) -> tuple[KDLoss, float] | None:
        """The same loss over users for each item (ICD)."""
        if self.settings.dcd_item_weight == 0.0:
            return None
        return DCDLoss(
            dataclasses.replace(self.settings, dcd_item_weight=0.0)
        ), self.settings.dcd_item_weight
