r"""FitNet: project the student's embeddings, and bring them to the teacher's.

.. math:: \ell = \sum_{u} \|P_U(s_u) - t_u\|^2 + \sum_{i} w_i \|P_I(s_i) - t_i\|^2

The sums run over the distinct users and items of a batch. :math:`w_i` is ½ if the item is among the
positives, plus ½ if it is among the negatives. P is linear, or a network with one hidden layer and
ReLU. With ``fitnet_normalise`` both sides are brought to length 1 first, which gives
:math:`2\,(1-\cos)`.

Source: Romero et al., FitNets, ICLR 2015; a control for the other embedding distillation methods.
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
    """Settings of FitNet; ``properties/loss/fitnet.yaml`` documents each."""

    prefix = "fitnet"

    fitnet_weight: float = setting(0.01, low=0.0)
    fitnet_sides: Literal["both", "users", "items"] = "both"
    fitnet_projector: Literal["linear", "mlp"] = "linear"
    fitnet_normalise: bool = False


class FitNetLoss(EmbeddingLoss):
    """Squared distance of the projected student to the teacher, with a projector for each side.

    Example:
        One user, and a projector that maps x to 2x + 1.

        >>> import torch
        >>> from recbole_rcekd.core.types import Seen, Vectors
        >>> from recbole_rcekd.losses.fitnet import FitNetLoss, FitNetSettings
        >>> loss = FitNetLoss(FitNetSettings(fitnet_sides="users"))
        >>> loss.build(1, 1, Seen.nothing(2, 2), torch.Generator())
        >>> projector = loss.projectors["of_users"]
        >>> _ = torch.nn.init.constant_(projector.weight, 2.0)
        >>> _ = torch.nn.init.constant_(projector.bias, 1.0)
        >>> users = Vectors(
        ...     ids=torch.tensor([1]),
        ...     student=torch.tensor([[3.0]]),
        ...     teacher=torch.tensor([[5.0]]),
        ...     weights=torch.ones(1),
        ... )
        >>> loss.forward(users, None).item()  # (7 − 5)²
        4.0
    """

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
        """The sum over users and items."""
        return self.sum_over_sides(self._of_side, users, items)

    def _of_side(self, side: str, vectors: Vectors) -> Tensor:
        found, wanted = self.projectors[f"of_{side}"](vectors.student), vectors.teacher.detach()
        if self.settings.fitnet_normalise:
            found, wanted = normalize(found), normalize(wanted)
        return squared_error(found, wanted, vectors.weights)
