r"""CD, collaborative distillation: the teacher's scores of a few sampled items as soft labels.

.. math:: \ell = \sum_{i\in D} \big[\log(1+e^{s_i}) - w_i\, s_i\big], \qquad
    w_i = \sigma\big((t_i + t_2)/t_1\big)

D holds n distinct items from the top-P unseen items of the student (of the teacher with
``cd_guide: teacher``). Two positions are drawn with probability
:math:`\propto e^{-(r+1)/(P\,T)}`, and the better one is taken, until there are n items. This is the
same as a weighted draw without replacement, and is done that way.

Source: Lee et al., Collaborative Distillation for Top-N Recommendation, ICDM 2019; sampling, soft
label and defaults as in woriazzc/RCEKD @ 771322a. Two deviations: repeats are really removed (their
Python set of tensors never removes any), and no 1e-10 is added inside the logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.functional import at_least_float32, draw_without_replacement
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class CDSettings(LossSettings):
    """Settings of CD; ``properties/loss/cd.yaml`` documents each."""

    prefix = "cd"

    cd_weight: float = setting(0.5, low=0.0)
    cd_items: int = setting(50, low=1)
    cd_pool: int = setting(3000, low=1)
    cd_guide: Literal["student", "teacher"] = "student"
    cd_sampling_temperature: float = setting(20.0, above=0.0)
    cd_label_scale: float = setting(2.0, above=0.0)
    cd_label_shift: float = 0.0

    def check_relations(self) -> None:
        """The items are drawn from the pool, so it must hold as many."""
        if self.cd_items > self.cd_pool:
            raise SettingsError(
                f"[cd_items]={self.cd_items} is larger than [cd_pool]={self.cd_pool}, from which "
                "they are drawn. Raise cd_pool or lower cd_items."
            )

    def longest_list(self) -> tuple[str, ...]:
        """The pool may be longer than the catalogue: then it holds all unseen items."""
        return ("cd_items",)


class CDLoss(KDLoss):
    """CD. Training items are not in the pool.

    Example:
        The soft label of both items is 3/4. The student gives the first a probability of 1/2, the
        second 1/4.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.cd import CDLoss, CDSettings
        >>> loss = CDLoss(CDSettings())
        >>> sets = ItemSets(
        ...     items=torch.tensor([[4, 9]]), teacher_scores=2 * torch.tensor([[3.0, 3.0]]).log()
        ... )
        >>> student_scores = torch.tensor([[1.0, 1 / 3]]).log()
        >>> value = loss.forward(student_scores, sets)  # ln 2 + (3/4 ln 4 + 1/4 ln 4/3)
        >>> round(value.item(), 4)
        1.8048
    """

    settings_type = CDSettings
    settings: CDSettings

    def select(self, candidates: Candidates) -> ItemSets:
        """``[n]`` distinct items of the pool; fewer where a user has fewer unseen items."""
        s = self.settings
        top = candidates.student_top if s.cd_guide == "student" else candidates.teacher_top
        pool = top(s.cd_pool, unseen=True)
        rank = torch.arange(1, pool.shape[1] + 1, device=pool.device)
        weights = torch.exp(-rank / (s.cd_pool * s.cd_sampling_temperature)) * (pool != 0)
        below = weights.flip(1).cumsum(1).flip(1) - weights
        # r is the better of two with probability ∝ w_r·(w_r + 2·Σ of the w below r). To repeat this
        # until there are n distinct items is to draw n without replacement.
        duels = weights.log() + (weights + 2.0 * below).log()
        drawn = draw_without_replacement(
            duels, min(s.cd_items, pool.shape[1]), candidates.generator
        )
        items = pool.gather(1, drawn)
        scores = candidates.teacher_scores(items)
        return ItemSets(items, scores, (items != 0) & (scores != -torch.inf))

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Binary cross-entropy with soft labels, from logits, summed over a user's items."""
        if sets.teacher_scores is None:
            raise ValueError("CDLoss needs teacher_scores; see CDLoss.select.")
        label = torch.sigmoid(
            (sets.teacher_scores.detach() + self.settings.cd_label_shift)
            / self.settings.cd_label_scale
        )
        scores = at_least_float32(student_scores)
        if sets.keep is None:
            return (softplus(scores) - label * scores).sum(-1)
        # Masked before, so that a masked score has no gradient, and after, since softplus(0) is not
        # 0.
        scores = scores.masked_fill(~sets.keep, 0.0)
        return (softplus(scores) - label * scores).masked_fill(~sets.keep, 0.0).sum(-1)
