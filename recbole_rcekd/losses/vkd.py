r"""VkD: project the student's vectors with an orthonormal matrix, which leaves all their products as they are.

.. math:: \ell = \sum_{u} \|P s_u - \hat t_u\|^2 + \sum_{i} w_i \|P s_i - \hat t_i\|^2, \qquad P^\top P = 1

over the distinct users and items of a batch, :math:`w_i` ½ for each of "is a positive" and "is a
negative". Any other projector can learn what the student should; this one only turns, so
:math:`\langle Ps, Ps'\rangle = \langle s, s'\rangle`. One P serves users and items: a score is a
product of one of each. ``vkd_standardise`` brings each of the teacher's dimensions to mean 0 and
deviation 1 over the batch: :math:`\hat t`; otherwise :math:`\hat t = t`.

Source: Miles et al., VkD, CVPR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recbole_rcekd.core.functional import squared_error
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.base import EmbeddingLoss


@dataclass(frozen=True)
class VkDSettings(LossSettings):
    """Settings of VkD; ``properties/loss/vkd.yaml`` gives type, purpose and source of each."""

    prefix = "vkd"

    vkd_weight: float = setting(0.1, low=0.0)
    vkd_sides: Literal["both", "users", "items"] = "both"
    vkd_standardise: bool = False


class VkDLoss(EmbeddingLoss):
    """Squared distance of the turned student to the teacher."""

    settings_type = VkDSettings
    settings: VkDSettings

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """One projector; its columns are orthonormal, or its rows where the student is wider than the teacher."""
        self.projector = nn.Parameter(torch.randn(teacher_width, student_width))

    def orthonormal(self) -> Tensor:
        """P ``[d_T, d_S]``, nearest in the sense of Gram and Schmidt to what is learned.

        Not torch's own ``orthogonal``, which keeps signs in the diagonal of its parameter and
        becomes 0 under weight decay.
        """
        wide = self.projector.shape[1] > self.projector.shape[0]
        parts: tuple[Tensor, Tensor] = torch.linalg.qr(
            self.projector.t() if wide else self.projector
        )
        q = parts[0] * parts[1].diagonal().sign()  # whose signs are arbitrary, and would jump
        return q.t() if wide else q

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over both sides."""
        matrix = self.orthonormal()
        return self.sum_over_sides(
            lambda side, vectors: self._of_side(matrix, vectors), users, items
        )

    def _of_side(self, matrix: Tensor, vectors: Vectors) -> Tensor:
        wanted = vectors.teacher.detach()
        if self.settings.vkd_standardise and len(wanted):
            deviation, mean = torch.std_mean(wanted, 0, correction=0)
            wanted = (wanted - mean) / (
                deviation + 1e-6
            )  # a dimension that does not vary becomes 0
        return squared_error(vectors.student @ matrix.t(), wanted, vectors.weights)
