r"""VkD: project the student's embeddings with an orthonormal matrix, which keeps their products.

.. math:: \ell = \sum_{u} \|P s_u - \hat t_u\|^2 + \sum_{i} w_i \|P s_i - \hat t_i\|^2,
    \qquad P^\top P = 1

The sums run over the distinct users and items of a batch. :math:`w_i` is ½ if the item is among the
positives, plus ½ if it is among the negatives. Any other projector can learn what the student
should learn. This one only rotates: :math:`\langle Ps, Ps'\rangle = \langle s, s'\rangle`. One P
serves users and items, because a score is a product of one of each.

:math:`\hat t = t`, or, with ``vkd_standardise``, each of the teacher's dimensions at mean 0 and
deviation 1 over the batch.

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
    """Settings of VkD; ``properties/loss/vkd.yaml`` documents each."""

    prefix = "vkd"

    vkd_weight: float = setting(0.1, low=0.0)
    vkd_sides: Literal["both", "users", "items"] = "both"
    vkd_standardise: bool = False


class VkDLoss(EmbeddingLoss):
    """Squared distance of the rotated student to the teacher.

    Example:
        One user. The learned matrix (3, 4) is brought to length 1, so P = (0.6, 0.8).

        >>> import torch
        >>> from recbole_rcekd.core.types import Seen, Vectors
        >>> from recbole_rcekd.losses.vkd import VkDLoss, VkDSettings
        >>> loss = VkDLoss(VkDSettings())
        >>> loss.build(1, 2, Seen.nothing(2, 2), torch.Generator())
        >>> loss.projector.data = torch.tensor([[3.0], [4.0]])
        >>> users = Vectors(
        ...     ids=torch.tensor([1]),
        ...     student=torch.tensor([[5.0]]),
        ...     teacher=torch.tensor([[3.0, 6.0]]),
        ...     weights=torch.ones(1),
        ... )
        >>> value = loss.forward(users, None)  # ‖(3, 4) − (3, 6)‖²
        >>> round(value.item(), 4)
        4.0
    """

    settings_type = VkDSettings
    settings: VkDSettings

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """One projector for users and items.

        Its columns are orthonormal, or its rows where the student is wider than the teacher.
        """
        self.projector = nn.Parameter(torch.randn(teacher_width, student_width))

    def orthonormal(self) -> Tensor:
        """P ``[d_T, d_S]``, made orthonormal from the learned matrix by Gram–Schmidt.

        Torch's own ``orthogonal`` keeps signs in the diagonal of its parameter and becomes 0 under
        weight decay.
        """
        wide = self.projector.shape[1] > self.projector.shape[0]
        parts: tuple[Tensor, Tensor] = torch.linalg.qr(
            self.projector.t() if wide else self.projector
        )
        # The signs of a QR decomposition are arbitrary and would jump.
        q = parts[0] * parts[1].diagonal().sign()
        return q.t() if wide else q

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over users and items."""
        matrix = self.orthonormal()
        return self.sum_over_sides(
            lambda side, vectors: self._of_side(matrix, vectors), users, items
        )

    def _of_side(self, matrix: Tensor, vectors: Vectors) -> Tensor:
        wanted = vectors.teacher.detach()
        if self.settings.vkd_standardise and len(wanted):
            deviation, mean = torch.std_mean(wanted, 0, correction=0)
            # A dimension that does not vary becomes 0.
            wanted = (wanted - mean) / (deviation + 1e-6)
        return squared_error(vectors.student @ matrix.t(), wanted, vectors.weights)
