r"""DCD as the RCE-KD authors ported it: the student's ranks are those among *all* items, training positives included.

.. math:: e^+ = \max\big(10^{-5}, \tanh(\max(0, (\rho_S-\rho_T)/T))\big), \qquad
    e^- = \max\big(10^{-5}, \tanh(\max(0, (\rho_T-\rho_S)/T))\big)

with ρ_T the place in the teacher's top-P unseen items and ρ_S the student's rank in the catalogue.
K items are drawn ∝ e⁺ and stand in the head *in the order of the draw*, not in the teacher's; K are
drawn ∝ e⁻ for the rest. The formula is that of
:mod:`.dcd`; users only. An item may be in both, as the smallest weight is not 0.

Source: woriazzc/RCEKD @ 771322a. It is here because their tables are made with it; :mod:`.dcd` is
    the published method.
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
    """Settings of the port of DCD; ``properties/loss/dcd_port.yaml`` gives type, purpose and source of each."""

    prefix = "dcd_port"

    dcd_port_weight: float = setting(0.01, low=0.0)
    dcd_port_items: int = setting(100, low=1)
    dcd_port_pool: int = setting(500, low=1)
    dcd_port_temperature: float = setting(10.0, above=0.0)

    def check_relations(self) -> None:
        """The items come out of the pool.

        Raises:
            SettingsError: they are more than it holds.
        """
        if self.dcd_port_items > self.dcd_port_pool:
            raise SettingsError(
                f"[dcd_port_items]={self.dcd_port_items} is larger than "
                f"[dcd_port_pool]={self.dcd_port_pool}, the list they are drawn from. Raise "
                "dcd_port_pool or lower dcd_port_items."
            )

    def longest_list(self) -> tuple[str, ...]:
        """A short catalogue shortens the pool."""
        return ("dcd_port_items",)


class DCDPortLoss(KDLoss):
    """The RCE-KD authors' DCD. Training positives are in neither list, but count in the student's ranks."""

    settings_type = DCDPortSettings
    settings: DCDPortSettings

    def select(self, lists: Candidates) -> ItemSets:
        """``[under-estimated (K), as drawn | over-estimated (K)]``; a short list of the teacher is masked."""
        s = self.settings
        pool = lists.teacher_top(s.dcd_port_pool, unseen=True)
        both = corrections(lists.student_ranks(pool) - 1, s.dcd_port_temperature)
        drawn = [
            drawn_items(
                pool,
                weights.clamp(min=_SMALLEST_WEIGHT).masked_fill(pool == 0, 0.0),
                s.dcd_port_items,
                lists.generator,
                in_order=False,
            )
            for weights in both
        ]
        items = torch.cat(drawn, dim=1)
        return ItemSets(items, keep=items != 0)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Plackett–Luce negative log-likelihood per row, summed over the under-estimated items."""
        if sets.keep is None:
            raise ValueError("DCDPortLoss needs keep; see DCDPortLoss.select.")
        k = sets.items.shape[1] - self.settings.dcd_port_items
        return plackett_luce(
            student_scores[:, :k], student_scores[:, k:], sets.keep[:, :k], sets.keep[:, k:]
        )
