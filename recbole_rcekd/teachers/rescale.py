"""A teacher's scores on another scale: standardised for each user, or divided by a temperature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.score_tables import blocks

# Scores with a smaller relative deviation are all the same number in float32.
SMALLEST_DEVIATION = 1e-7


class RescaledScores(TeacherScores):
    """A teacher's scores, shifted and scaled for each user: (score − μ)·a.

    Scores of −inf stay −inf. The top-K lists are the teacher's own. (After :meth:`transposed`, μ
    and a belong to the items in a list. They would change the order, but the lists stay the
    teacher's own there too.)

    Args:
        scores: the teacher's scores.
        shift: μ for each user (or row), ``[n_contexts]``.
        scale: a for each user (or row), ``[n_contexts]``; above 0, or 0 for users whose scores are
            all the same.
        by_item: shifts and scales belong to the items, as after :meth:`transposed`.
    """

    def __init__(
        self, scores: TeacherScores, shift: Tensor, scale: Tensor, by_item: bool = False
    ) -> None:
        self.n_contexts, self.n_items = scores.n_contexts, scores.n_items
        self.partial = scores.partial
        self._scores, self._shift, self._scale, self._by_item = scores, shift, scale, by_item

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._rescaled(
            self._scores.score(contexts, items),
            items.long() if self._by_item else contexts[:, None],
        )

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._rescaled(
            self._scores.score_all(contexts), slice(None) if self._by_item else contexts[:, None]
        )

    def _rescaled(self, scores: Tensor, index: Tensor | slice) -> Tensor:
        shifted = moved(scores, self._shift[index], self._scale[index])
        return shifted.masked_fill(scores == -torch.inf, -torch.inf)

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._scores.top_k(contexts, k, unseen)

    def transposed(self) -> RescaledScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; the scores stay the same."""
        return RescaledScores(
            self._scores.transposed(), self._shift, self._scale, not self._by_item
        )


def rescaled(
    scores: TeacherScores,
    how: Literal["raw", "standardised"],
    temperature: float,
    device: torch.device | str = "cpu",
) -> TeacherScores:
    """The same ranking on another scale.

    The scores are standardised for each user, if ``how`` says so, and divided by ``temperature``.

    Args:
        scores: the teacher's scores.
        how: the key ``kd_teacher_scores``.
        temperature: the key ``kd_teacher_temperature``.
        device: the device of the scores.
    """
    if how == "standardised":
        mean, deviation = moments(scores, device)
        scale = scale_to(deviation, 1.0 / temperature).float()
    elif temperature == 1.0:
        return scores
    else:
        mean = torch.zeros(scores.n_contexts, device=device)
        scale = torch.full_like(mean, 1.0 / temperature)
    return RescaledScores(scores, mean.float(), scale)


def moments(part: TeacherScores, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each user's scores of all items, ``[n_contexts]``, float64.

    The deviation is 0 for a user whose scores are all the same, as far as float32 can tell. It is
    also 0 for a user whom the teacher does not cover; the mean is −inf then.

    Args:
        part: the scores of one teacher.
        device: the device of the scores.
    """
    known = part.moments()
    if known is None:
        found = []
        for block in blocks(part.n_contexts, part.n_items):
            scores = part.score_all(block.to(device))[:, 1:].double()
            found.append(torch.stack([scores.mean(1), scores.var(1, correction=0)]))
        mean, variance = torch.cat(found, dim=1)
        known = mean, variance, mean.abs()
    mean, variance, size = known
    deviation = variance.sqrt().nan_to_num(0.0)
    return mean, deviation.masked_fill(deviation <= SMALLEST_DEVIATION * size, 0.0)


def scale_to(deviation: Tensor, share: float) -> Tensor:
    """The factor that scales scores to a deviation of ``share``; 0 where they are all the same."""
    return (share / deviation).masked_fill(deviation == 0, 0.0)


def moved(scores: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(score − shift) · scale; where the scale is 0 the result is 0, also for a score of −inf."""
    return ((scores - shift) * scale).masked_fill(scale == 0, 0.0)
