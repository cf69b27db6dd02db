r"""FTD, full topology distillation: learn how alike the teacher finds any two of a batch's users and items.

.. math:: \sum_{a,b} \big(\cos(t_a, t_b) - \cos(s_a, s_b)\big)^2

over all ordered pairs of the batch's distinct users and items. No learned part: only cosines are
compared, so the widths of the two may differ. With :math:`\hat T, \hat S` the rows at length 1 this
is

.. math:: \|\hat T\hat T^\top - \hat S\hat S^\top\|^2
    = \|\hat T^\top\hat T\|^2 - 2\,\|\hat T^\top\hat S\|^2 + \|\hat S^\top\hat S\|^2

whose matrices are as wide as vectors, not as long as the batch: every pair counts and none is
stored.

Source: Kang et al., Topology Distillation for Recommender System, KDD 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recbole_rcekd.core.functional import unit_rows
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import Vectors
from recbole_rcekd.losses.base import EmbeddingLoss


@dataclass(frozen=True)
class FTDSettings(LossSettings):
    """Settings of FTD; ``properties/loss/ftd.yaml`` gives type, purpose and source of each."""

    prefix = "ftd"

    ftd_weight: float = setting(0.001, low=0.0)
    ftd_sides: Literal["both", "users", "items"] = "both"


class FTDLoss(EmbeddingLoss):
    """Squared differences of cosines. An item counts once, whether it is among the positives, the negatives or both.

    In float32 the value is exact to about 1e-6 of the sum of the teacher's squared cosines.
    """

    settings_type = FTDSettings
    settings: FTDSettings

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """Summed over ordered pairs; a pair of different sides counts too."""
        sides = [side for side in (users, items) if side is not None]
        student = unit_rows(torch.cat([side.student[: side.n] for side in sides]))
        teacher = unit_rows(torch.cat([side.teacher[: side.n] for side in sides]).detach())
        return (
            _overlap(teacher, teacher)
            - 2.0 * _overlap(teacher, student)
            + _overlap(student, student)
        )


def _overlap(left: Tensor, right: Tensor) -> Tensor:
    """``Σ_ab (l_a · l_b)(r_a · r_b)`` of two tables with the same rows."""
    return (left.t() @ right).square().sum()
