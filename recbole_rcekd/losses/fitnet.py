r"""FitNet: project the student's vectors into the teacher's space and bring them to the teacher's.

.. math:: \ell = \sum_{u} \|P_U(s_u) - t_u\|^2 + \sum_{i} w_i \|P_I(s_i) - t_i\|^2

over the distinct users and items of a batch, :math:`w_i` ½ for each of "is a positive" and "is a
negative". P is linear, or one hidden layer with ReLU. ``fitnet_normalise`` brings both sides to
length 1 first: :math:`2\,(1-\cos)`.

Source: Romero et al., FitNets, ICLR 2015, as a control for the other methods of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from recbole_rcekd.core.functional import squared_error
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.base import EmbeddingLoss


@dataclass(frozen=True)
class FitNetSettings(LossSettings):
    """Settings of FitNet; ``properties/loss/fitnet.yaml`` gives type, purpose and source of each."""

    prefix = "fitnet"

    fitnet_weight: float = setting(0.01, low=0.0)
    fitnet_sides: Literal["both", "users", "items"] = "both"
    fitnet_projector: Literal["linear", "mlp"] = "linear"
    fitnet_normalise: bool = False


class FitNetLoss(EmbeddingLoss):
    """Squared distance of the projected student to the teacher, with a projector for users and one for items."""

    settings_type = FitNetSettings
    settings: FitNetSettings

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """A projector for each side."""
        self.projectors = nn.ModuleDict(
            {f"of_{side}": self._projector(student_width, teacher_width) for side in self.sides}
        )

    def _projector(self, student_width: int, teacher_width: int) -> nn.Module:
        if self.settings.fitnet_projector == "linear":
            return nn.Linear(student_width, teacher_width)
        hidden = (student_width + teacher_width) // 2
        return nn.Sequential(
            nn.Linear(student_width, hidden), nn.ReLU(), nn.Linear(hidden, teacher_width)
        )

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over both sides."""
        return self.sum_over_sides(self._of_side, users, items)

    def _of_side(self, side: str, vectors: Vectors) -> Tensor:
        found, wanted = self.projectors[f"of_{side}"](vectors.student), vectors.teacher.detach()
        if self.settings.fitnet_normalise:
            found, wanted = normalize(found), normalize(wanted)
        return squared_error(found, wanted, vectors.weights)
