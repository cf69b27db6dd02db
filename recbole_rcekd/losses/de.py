r"""DE, distillation experts: a few small networks rebuild the teacher's embeddings.

.. math::
    \ell &= \sum_{u} \|t_u - \hat t_u\|^2 + \sum_{i} w_i \|t_i - \hat t_i\|^2 \\
    \hat t &= \sum_{k=1}^{E} g_k\, f_k(s), \qquad
    g = \mathrm{softmax}\big((\log\alpha(t) + G)/T\big)

The sums run over the distinct users and items of a batch. :math:`w_i` is ½ if the item is among the
positives, plus ½ if it is among the negatives. :math:`f_k` are the E experts, networks that read
the student's embedding. :math:`\alpha(t)` is the softmax of a linear map of the teacher's
embedding, G is Gumbel noise. T falls from 1 to 1e-10 in the course of ``epochs``, so that in the
end each embedding has one expert. Users and items have experts of their own.

Source: Kang et al., DE-RRD, CIKM 2020; SeongKu-Kang/DE-RRD and woriazzc/RCEKD @ 771322a.
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

_LAST_TEMPERATURE = 1e-10
# Below this temperature the best expert alone is taken. One row in ten thousand would still be a
# mixture, with a gradient of size 1/T.
_TINY = 1e-4


@dataclass(frozen=True)
class DESettings(LossSettings):
    """Settings of DE; ``properties/loss/de.yaml`` documents each."""

    prefix = "de"

    de_weight: float = setting(0.01, low=0.0)
    de_sides: Literal["both", "users", "items"] = "both"
    de_experts: int = setting(30, low=1)


class Experts(nn.Module):
    """E networks with one hidden layer each. Experts with a share of 0 in a row are not computed.

    Args:
        n: the number of experts, E.
        student_width: of their input.
        teacher_width: of their output. The hidden layers are half-way between the two widths.
    """

    def __init__(self, n: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.n = n
        hidden = (student_width + teacher_width) // 2
        self.first = nn.Linear(student_width, n * hidden)
        # Initialised as nn.Linear would be for one expert.
        bound = hidden**-0.5
        self.second = nn.Parameter(torch.empty(n * hidden, teacher_width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, teacher_width).uniform_(-bound, bound))

    def forward(self, vectors: Tensor, shares: Tensor) -> Tensor:
        """Σ_k shares_k f_k(vectors): ``[m, d_S]``, ``[m, n]`` → ``[m, d_T]``."""
        expert, row = shares.t().nonzero(as_tuple=True)
        counts = torch.bincount(expert, minlength=self.n).tolist()
        parts = zip(
            torch.split(row, counts),
            torch.split(shares.t()[expert, row], counts),
            self.first.weight.view(self.n, -1, vectors.shape[1]).unbind(),
            self.first.bias.view(self.n, -1).unbind(),
            self.second.view(self.n, -1, self.bias.shape[1]).unbind(),
            strict=True,
        )
        found = shares @ self.bias
        for own, share, weight, bias, second in parts:
            hidden = torch.addmm(
                bias, vectors.index_select(0, own), weight.t()
            ).relu() * share.unsqueeze(1)
            found.index_add_(0, own, hidden @ second)
        return found


class DELoss(EmbeddingLoss):
    """Squared distance of the teacher's embeddings to what the experts make of the student's.

    Attributes:
        temperature: T of this epoch.
        generator: the source of the noise.

    Example:
        One user, and one expert whose parameters are all 1: f(s) = max(0, s + 1) + 1.

        >>> import torch
        >>> from recbole_rcekd.core.types import Seen, Vectors
        >>> from recbole_rcekd.losses.de import DELoss, DESettings
        >>> loss = DELoss(DESettings(de_experts=1))
        >>> loss.build(1, 1, Seen.nothing(2, 2), torch.Generator())
        >>> for parameter in loss.experts.parameters():
        ...     _ = torch.nn.init.ones_(parameter)
        >>> users = Vectors(
        ...     ids=torch.tensor([1]),
        ...     student=torch.tensor([[2.0]]),
        ...     teacher=torch.tensor([[7.0]]),
        ...     weights=torch.ones(1),
        ... )
        >>> loss.forward(users, None).item()  # (f(2) − 7)² = (4 − 7)²
        9.0
    """

    settings_type = DESettings
    settings: DESettings
    generator: torch.Generator

    def __init__(self, settings: DESettings) -> None:
        super().__init__(settings)
        self.temperature = 1.0

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """Experts and a gate for each side."""
        n = self.settings.de_experts
        self.generator = generator
        self.experts = nn.ModuleDict(
            {f"of_{side}": Experts(n, student_width, teacher_width) for side in self.sides}
        )
        self.gates = nn.ModuleDict(
            {f"of_{side}": nn.Linear(teacher_width, n) for side in self.sides}
        )

    def begin_epoch(self, progress: float) -> None:
        """Let T fall."""
        self.temperature = _LAST_TEMPERATURE**progress

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over users and items."""
        return self.sum_over_sides(self._of_side, users, items)

    def _of_side(self, side: str, vectors: Vectors) -> Tensor:
        wanted = vectors.teacher.detach()
        found = self.experts[f"of_{side}"](
            vectors.student, self._shares(self.gates[f"of_{side}"](wanted))
        )
        return squared_error(found, wanted, vectors.weights)

    def _shares(self, logits: Tensor) -> Tensor:
        """Draw g.

        Shares that are too small to change a value or a gradient (of size 1/T) are set to 0, so
        that their experts need not be computed.
        """
        noisy = (
            logits.log_softmax(1)
            - torch.empty_like(logits).exponential_(generator=self.generator).log()
        )
        if self.temperature < _TINY:
            return torch.nn.functional.one_hot(noisy.argmax(1), logits.shape[1]).to(logits.dtype)
        shares = (noisy / self.temperature).softmax(1)
        return shares.masked_fill(shares < torch.finfo(shares.dtype).eps * self.temperature, 0.0)
