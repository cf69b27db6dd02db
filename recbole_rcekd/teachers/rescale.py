"""A teacher's scores on another scale: standardised for each user, or divided by a temperature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.score_cache import blocks

# Scores that differ by less, relative to their size, are one number in float32.
SMALLEST_DEVIATION = 1e-7


class RescaledScores(TeacherScores):
    """A teacher's scores, moved and scaled per context: (score − μ)·a, and −inf as before. Its lists are the teacher's own.

    Also :meth:`transposed`, where μ and a belong to what is listed and would move ranks.

    Args:
        scores: of the teacher.
        shift: μ, ``[n_contexts]``.
        scale: a, above 0, or 0 for contexts whose scores are all the same, ``[n_contexts]``.
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

    def _rescaled(self, scores: Tensor, place: Tensor | slice) -> Tensor:
        shifted = moved(scores, self._shift[place], self._scale[place])
        return shifted.masked_fill(scores == -torch.inf, -torch.inf)

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._scores.top_k(contexts, k, unseen)

    def transposed(self) -> RescaledScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; contexts are on the same scale as before."""
        return RescaledScores(
            self._scores.transposed(), self._shift, self._scale, not self._by_item
        )


def rescaled(
    scores: TeacherScores,
    how: Literal["raw", "standardised"],
    temperature: float,
    device: torch.device | str = "cpu",
) -> TeacherScores:
    """The same ranking on another scale: standardised per context or not, then divided by ``temperature``.

    Args:
        scores: of the teacher.
        how: ``kd_teacher_scores``.
        temperature: ``kd_teacher_temperature``.
        device: where the scores are.
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
    """Mean and standard deviation of each user's scores over the catalogue, ``[n_contexts]``, float64.

    The deviation is 0 where the scores are all one number, as far as float32 can tell, or where
    there are none (the mean is then −inf).
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
    """What brings scores to a deviation of ``share``; 0 where they are all the same."""
    return (share / deviation).masked_fill(deviation == 0, 0.0)


def moved(scores: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(score − shift) · scale; 0, and never NaN, where the scale is 0: there, a score may be −inf."""
    return ((scores - shift) * scale).masked_fill(scale == 0, 0.0)
