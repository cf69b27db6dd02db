r"""DCD as the RCE-KD authors ported it: the student's ranks are those among *all* items.

.. math::
    e^+ &= \max\big(10^{-5}, \tanh(\max(0, (\rho_S-\rho_T)/T))\big) \\
    e^- &= \max\big(10^{-5}, \tanh(\max(0, (\rho_T-\rho_S)/T))\big)

ρ_T is the position among the teacher's top-P unseen items. ρ_S is the student's rank among all
items, training items included. K items are drawn with probability ∝ e⁺; they are the head, *in the
order of the draw*, not in the teacher's order. K items are drawn with probability ∝ e⁻; they are
the rest. The smallest weight is not 0, so an item may be in both. The formula is that of
:mod:`.dcd`; there is no item side.

Source: woriazzc/RCEKD @ 771322a. This loss is for comparisons with the tables of that paper;
:mod:`.dcd` is the published method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.functional import plackett_luce
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.dcd import corrections, drawn_items

_SMALLEST_WEIGHT = 1e-5


@dataclass(frozen=True)
class DCDPortSettings(LossSettings):
    """Settings of the port of DCD; ``properties/loss/dcd_port.yaml`` documents each."""

    prefix = "dcd_port"

    dcd_port_weight: float = setting(0.01, low=0.0)
    dcd_port_items: int = setting(100, low=1)
    dcd_port_pool: int = setting(500, low=1)
    dcd_port_temperature: float = setting(10.0, above=0.0)

    def check_relations(self) -> None:
        """The items are drawn from the pool, so it must hold as many.

        Raises:
            SettingsError: the pool is too short.
        """
        if self.dcd_port_items > self.dcd_port_pool:
            raise SettingsError(
                f"[dcd_port_items]={self.dcd_port_items} is larger than "
                f"[dcd_port_pool]={self.dcd_port_pool}, from which they are drawn. Raise "
                "dcd_port_pool or lower dcd_port_items."
            )

    def longest_list(self) -> tuple[str, ...]:
        """The pool may be longer than the catalogue: then it holds all unseen items."""
        return ("dcd_port_items",)


class DCDPortLoss(KDLoss):
    """The RCE-KD authors' DCD. Training items are left out, but count in the student's ranks.

    Example:
        Items 1 and 2 are the head, 3 and 4 the rest. The student picks item 1 first with
        probability 3/6, then item 2 with probability 1/3.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.dcd_port import DCDPortLoss, DCDPortSettings
        >>> loss = DCDPortLoss(DCDPortSettings(dcd_port_items=2))
        >>> items = torch.tensor([[1, 2, 3, 4]])
        >>> sets = ItemSets(items, keep=items != 0)
        >>> student_scores = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # −ln(3/6 · 1/3)
        >>> round(value.item(), 4)
        1.7918
    """

    settings_type = DCDPortSettings
    settings: DCDPortSettings

    def select(self, candidates: Candidates) -> ItemSets:
        """``[under-estimated (K), in the order of the draw | over-estimated (K)]``.

        Where a pool has fewer than K items, the others are 0 and masked.
        """
        s = self.settings
        pool = candidates.teacher_top(s.dcd_port_pool, unseen=True)
        both = corrections(candidates.student_ranks(pool) - 1, s.dcd_port_temperature)
        drawn = [
            drawn_items(
                pool,
                weights.clamp(min=_SMALLEST_WEIGHT).masked_fill(pool == 0, 0.0),
                s.dcd_port_items,
                candidates.generator,
                in_order=False,
            )
            for weights in both
        ]
        items = torch.cat(drawn, dim=1)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood of each user, summed over its head."""
        if sets.keep is None:
            raise ValueError("DCDPortLoss needs keep; see DCDPortLoss.select.")
        k = sets.items.shape[1] - self.settings.dcd_port_items
        return plackett_luce(
            student_scores[:, :k], student_scores[:, k:], sets.keep[:, :k], sets.keep[:, k:]
        )
