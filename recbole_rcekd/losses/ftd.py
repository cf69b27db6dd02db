r"""FTD, full topology distillation: the cosines between all users and items of a batch.

.. math:: \sum_{a,b} \big(\cos(t_a, t_b) - \cos(s_a, s_b)\big)^2

The sum runs over all ordered pairs of the batch's distinct users and items. Only cosines are
compared, so there is no learned part, and the two may have different widths. With
:math:`\hat T, \hat S` the rows at length 1 this is

.. math:: \|\hat T\hat T^\top - \hat S\hat S^\top\|^2
    = \|\hat T^\top\hat T\|^2 - 2\,\|\hat T^\top\hat S\|^2 + \|\hat S^\top\hat S\|^2

The matrices on the right are as wide as the embeddings, not as long as the batch: every pair
counts, and none is stored.

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
    """Settings of FTD; ``properties/loss/ftd.yaml`` documents each."""

    prefix = "ftd"

    ftd_weight: float = setting(0.001, low=0.0)
    ftd_sides: Literal["both", "users", "items"] = "both"


class FTDLoss(EmbeddingLoss):
    """Squared differences of cosines.

    An item counts once, whether it is among the positives, the negatives or both. In float32 the
    value is exact to about 1e-6 of the sum of the teacher's squared cosines.

    Example:
        Two users, at 90° for the teacher (cosine 0) and at 45° for the student (cosine √½).

        >>> import torch
        >>> from recbole_rcekd.core.types import Vectors
        >>> from recbole_rcekd.losses.ftd import FTDLoss, FTDSettings
        >>> loss = FTDLoss(FTDSettings())
        >>> users = Vectors(
        ...     ids=torch.tensor([1, 2]),
        ...     student=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        ...     teacher=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        ...     weights=torch.ones(2),
        ... )
        >>> value = loss.forward(users, None)  # two ordered pairs: 2 · (0 − √½)²
        >>> round(value.item(), 4)
        1.0
    """

    settings_type = FTDSettings
    settings: FTDSettings

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over ordered pairs; a pair of a user and an item counts too."""
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
