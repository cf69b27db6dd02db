r"""DCD, dual correction distillation: teach where the student errs within the teacher's top-P.

Among the teacher's top-P unseen items, ρ_T is an item's position, and ρ_S its position when they
are sorted by the student's scores:

.. math::
    e^+ &= \tanh\big(\max(0, (\rho_S-\rho_T)/T)\big) \quad\text{(under-estimated)} \\
    e^- &= \tanh\big(\max(0, (\rho_T-\rho_S)/T)\big) \quad\text{(over-estimated)}

n under-estimated items, drawn with probability ∝ e⁺ and put in the teacher's order, are the head π
of a Plackett–Luce likelihood. n over-estimated items, drawn with probability ∝ e⁻, are the rest,
which should rank below:

.. math:: \ell = \sum_{k=1}^{n}
    \Big[\log\Big(\sum_{k'\ge k} e^{s_{\pi_{k'}}} + \sum_{l\in\text{rest}} e^{s_l}\Big)
    - s_{\pi_k}\Big]

This is the user side (UCD). The item side (ICD) is the same for each item over its users;
``dcd_item_weight`` is its weight relative to the user side.

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
    """Settings of DCD; ``properties/loss/dcd.yaml`` documents each."""

    prefix = "dcd"

    dcd_weight: float = setting(0.01, low=0.0)
    dcd_items: int = setting(50, low=1)
    dcd_pool: int = setting(500, low=1)
    dcd_temperature: float = setting(10.0, above=0.0)
    dcd_item_weight: float = setting(1.0, low=0.0)

    def check_relations(self) -> None:
        """The items are drawn from the pool, so it must hold as many.

        Raises:
            SettingsError: the pool is too short.
        """
        if self.dcd_items > self.dcd_pool:
            raise SettingsError(
                f"[dcd_items]={self.dcd_items} is larger than [dcd_pool]={self.dcd_pool}, from "
                "which they are drawn. Raise dcd_pool or lower dcd_items."
            )

    def longest_list(self) -> tuple[str, ...]:
        """The pool may be longer than the catalogue: then it holds all unseen items."""
        return ("dcd_items",)


def corrections(student_rank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """e⁺ and e⁻ ``[n, P]``: how far too low, and too high, the student ranks the items of a pool.

    Args:
        student_rank: the student's ranks of them, from 0, ``[n, P]``.
        temperature: T, in positions.
    """
    gap = (
        student_rank - torch.arange(student_rank.shape[1], device=student_rank.device)
    ) / temperature
    return gap.clamp(min=0.0).tanh(), (-gap).clamp(min=0.0).tanh()


def drawn_items(
    pool: Tensor, weights: Tensor, n: int, generator: torch.Generator, in_order: bool
) -> Tensor:
    """``n`` items of each row of ``pool [rows, P]``, drawn without replacement: ``[rows, n]``.

    The probability of an item is proportional to its weight. Where fewer than ``n`` items have a
    weight above 0, the others are 0.

    Args:
        pool: item ids, ``[rows, P]``.
        weights: at least 0, ``[rows, P]``.
        n: how many items to draw.
        generator: the source of the draws.
        in_order: put the drawn items in the order of the pool; if not, they keep the order of the
            draw.
    """
    place = draw_without_replacement(weights.log(), min(n, pool.shape[1]), generator)
    place = place.masked_fill(weights.gather(1, place) == 0, pool.shape[1])
    if in_order:
        place = place.sort(1).values
    items = torch.nn.functional.pad(pool, (0, 1)).gather(1, place)
    return torch.nn.functional.pad(items, (0, n - items.shape[1]))


class DCDLoss(KDLoss):
    """DCD, with the item side unless ``dcd_item_weight`` is 0. Training items are left out.

    Example:
        Items 1 and 2 are under-estimated, 3 and 4 over-estimated. The student picks item 1 first
        with probability 3/6, then item 2 with probability 1/3.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.dcd import DCDLoss, DCDSettings
        >>> loss = DCDLoss(DCDSettings(dcd_items=2))
        >>> items = torch.tensor([[1, 2, 3, 4]])
        >>> sets = ItemSets(items, keep=items != 0)
        >>> student_scores = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # −ln(3/6 · 1/3)
        >>> round(value.item(), 4)
        1.7918
    """

    settings_type = DCDSettings
    settings: DCDSettings

    def select(self, candidates: Candidates) -> ItemSets:
        """``[under-estimated (n), in the teacher's order | over-estimated (n)]``.

        Where there are fewer than n, the others are 0 and masked.
        """
        s = self.settings
        pool = candidates.teacher_top(s.dcd_pool, unseen=True)
        scores = candidates.student_scores(pool).masked_fill(pool == 0, -torch.inf)
        # A stable sort: items with equal scores keep the teacher's order, which is no error.
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        under, over = corrections(rank, s.dcd_temperature)
        head = drawn_items(pool, under, s.dcd_items, candidates.generator, in_order=True)
        tail = drawn_items(pool, over, s.dcd_items, candidates.generator, in_order=False)
        items = torch.cat([head, tail], dim=1)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood of each user, summed over its head."""
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
