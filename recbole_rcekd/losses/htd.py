r"""HTD, hierarchical topology distillation: cosines to groups, and cosines inside groups.

.. math::
    \ell = \alpha\,\Big[&\sum_{a}\sum_{G} \big(\cos(t_a, \bar t_G) - \cos(s_a, \bar s_G)\big)^2 \\
    &+ \sum_{a,b} M_{ab} \big(\cos(t_a, t_b) - \cos(s_a, s_b)\big)^2\Big]
    + (1-\alpha)\,\mathrm{GA}

a, b are the batch's distinct users and items, G the groups that they are in. :math:`\bar t_G` is
the mean of a group's members in the batch (no gradient goes through it). :math:`M_{ab}` is 1 for
ordered pairs of one group whose :math:`\cos(t_a, t_b)` is positive, and 0 otherwise. The group of a
user or an item is what the gate of :class:`~recbole_rcekd.losses.de.DELoss` finds most probable for
its teacher embedding. GA is the loss of DE: members of a group are rebuilt by the same expert.
Users and items have groups of their own.

Source: Kang et al., Topology Distillation for Recommender System, KDD 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_rcekd.core.functional import unit_rows
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.base import EmbeddingLoss
from recbole_rcekd.losses.de import DELoss, DESettings

# How many pairs are computed at a time: 16 MB of float32 for each of some five matrices. A gate may
# put all users into one group.
_PAIRS = 4_000_000


@dataclass(frozen=True)
class HTDSettings(LossSettings):
    """Settings of HTD; ``properties/loss/htd.yaml`` documents each."""

    prefix = "htd"

    htd_weight: float = setting(0.001, low=0.0)
    htd_sides: Literal["both", "users", "items"] = "both"
    htd_groups: int = setting(30, low=1)
    htd_alpha: float = setting(0.5, low=0.0, high=1.0)


class HTDLoss(EmbeddingLoss):
    """Topology distillation on two levels.

    An item counts once, whether it is among the positives, the negatives or both.

    Attributes:
        assignment: the DE loss, whose gates assign the groups.

    Example:
        Two users in one group, with α = 1. Their teacher embeddings are orthogonal (not alike), so
        only the cosines to the group's mean count.

        >>> import torch
        >>> from recbole_rcekd.core.types import Seen, Vectors
        >>> from recbole_rcekd.losses.htd import HTDLoss, HTDSettings
        >>> loss = HTDLoss(HTDSettings(htd_groups=1, htd_alpha=1.0))
        >>> loss.build(2, 2, Seen.nothing(3, 2), torch.Generator())
        >>> users = Vectors(
        ...     ids=torch.tensor([1, 2]),
        ...     student=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),  # both at the mean: cosines 1
        ...     teacher=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),  # at 45° to the mean: cosines √½
        ...     weights=torch.ones(2),
        ... )
        >>> value = loss.forward(users, None)  # 2 · (√½ − 1)²
        >>> round(value.item(), 4)
        0.1716
    """

    settings_type = HTDSettings
    settings: HTDSettings

    def __init__(self, settings: HTDSettings) -> None:
        super().__init__(settings)
        self.assignment = DELoss(
            DESettings(de_sides=settings.htd_sides, de_experts=settings.htd_groups)
        )

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """Experts and a gate for each side."""
        self.assignment.build(student_width, teacher_width, seen, generator)

    def begin_epoch(self, progress: float) -> None:
        """Let the temperature of the assignment fall."""
        self.assignment.begin_epoch(progress)

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over users, items and ordered pairs; no group has users and items."""
        alpha = self.settings.htd_alpha
        users, items = (None if side is None else _counted_once(side) for side in (users, items))
        sides = {
            name: side for name, side in (("users", users), ("items", items)) if side is not None
        }
        student = torch.cat([side.student for side in sides.values()])
        teacher = torch.cat([side.teacher for side in sides.values()]).detach()
        groups = torch.cat([self.groups(name, side.teacher) for name, side in sides.items()])
        topology = among_groups(student, teacher, groups) + within_groups(student, teacher, groups)
        return alpha * topology + (1.0 - alpha) * self.assignment.forward(users, items)

    def groups(self, side: str, teacher: Tensor) -> Tensor:
        """The group of each row, ``[n]``: 0 to K − 1 for users, K to 2K − 1 for items."""
        with torch.no_grad():
            best: Tensor = self.assignment.gates[f"of_{side}"](teacher).argmax(1)
        return best + (self.settings.htd_groups if side == "items" else 0)


def _counted_once(side: Vectors) -> Vectors:
    """The embeddings of the batch, with weights of 1."""
    n = side.n
    return Vectors(side.ids[:n], side.student[:n], side.teacher[:n], torch.ones_like(side.weights))


def among_groups(student: Tensor, teacher: Tensor, groups: Tensor) -> Tensor:
    """Squared differences of the cosines between each row and the mean of each group that occurs.

    No gradient goes through a mean.
    """
    present, place = torch.unique(groups, return_inverse=True)

    def cosines(x: Tensor) -> Tensor:
        sums = x.new_zeros(len(present), x.shape[1]).index_add(0, place, x.detach())
        return unit_rows(x) @ unit_rows(sums).t()  # a sum points where the mean does

    return (cosines(teacher) - cosines(student)).square().sum()


def within_groups(student: Tensor, teacher: Tensor, groups: Tensor) -> Tensor:
    """Squared differences of the cosines between members of one group, over ordered pairs.

    Only pairs that are alike for the teacher count (cosine above 0).
    """
    order = groups.argsort()
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    found: Tensor = _WithinGroups.apply(
        unit_rows(student), unit_rows(teacher), torch.split(order, counts.tolist())
    )  # type: ignore[no-untyped-call]
    return found


class _WithinGroups(torch.autograd.Function):
    """Computes the gradient along with the value, some rows of a group at a time.

    Autograd would keep all pairs.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, groups: tuple[Tensor, ...]) -> Tensor:
        value, slope = student.new_zeros(()), torch.zeros_like(student)
        for members in groups:
            ours, theirs = student[members], teacher[members]
            places = torch.arange(len(members), device=members.device)
            for rows in torch.split(places, max(1, _PAIRS // len(members))):
                alike = theirs[rows] @ theirs.t()
                gap = (ours[rows] @ ours.t() - alike).masked_fill_(alike <= 0, 0.0)
                value += gap.square().sum()
                # Each pair occurs in both orders.
                slope[members[rows]] = 4.0 * gap @ ours
        ctx.slope = slope
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.slope, None, None
