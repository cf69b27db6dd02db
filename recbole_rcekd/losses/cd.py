r"""CD, collaborative distillation: the teacher's score of a few sampled items as a soft label.

.. math:: \ell = \sum_{i\in D} \big[\log(1+e^{s_i}) - w_i\, s_i\big], \qquad w_i = \sigma\big((t_i + t_2)/t_1\big)

D holds n distinct items from the guide's (student's or teacher's) top-P unseen items: two positions
are drawn with probability :math:`\propto e^{-(r+1)/(P\,T)}`, the better of the two is taken, until
there are n. This is done at once, as a draw without replacement with the probabilities of winning
such a duel.

Source: Lee et al., Collaborative Distillation for Top-N Recommendation, ICDM 2019; sampling, soft
label and defaults as in woriazzc/RCEKD @ 771322a. Two deviations: repeats are really removed (their
Python set of tensors never does), and no 1e-10 is added inside the logarithm.
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
    """Settings of CD; ``properties/loss/cd.yaml`` gives type, purpose and source of each."""

    prefix = "cd"

    cd_weight: float = setting(0.5, low=0.0)
    cd_items: int = setting(50, low=1)
    cd_pool: int = setting(3000, low=1)
    cd_guide: Literal["student", "teacher"] = "student"
    cd_sampling_temperature: float = setting(20.0, above=0.0)
    cd_label_scale: float = setting(2.0, above=0.0)
    cd_label_shift: float = 0.0

    def check_relations(self) -> None:
        """The items come out of the pool."""
        if self.cd_items > self.cd_pool:
            raise SettingsError(
                f"[cd_items]={self.cd_items} is larger than [cd_pool]={self.cd_pool}, the list it "
                "is drawn from. Raise cd_pool or lower cd_items."
            )

    def longest_list(self) -> tuple[str, ...]:
        """The pool may be longer than the catalogue: it then holds all unseen items."""
        return ("cd_items",)


class CDLoss(KDLoss):
    """CD. Training positives are not in the pool."""

    settings_type = CDSettings
    settings: CDSettings

    def select(self, lists: Candidates) -> ItemSets:
        """``[n]`` distinct items of the guide's list; fewer where a user has fewer unseen items."""
        s = self.settings
        top = lists.student_top if s.cd_guide == "student" else lists.teacher_top
        pool = top(s.cd_pool, unseen=True)
        rank = torch.arange(1, pool.shape[1] + 1, device=pool.device)
        weights = torch.exp(-rank / (s.cd_pool * s.cd_sampling_temperature)) * (pool != 0)
        below = weights.flip(1).cumsum(1).flip(1) - weights
        # r wins a duel with probability ∝ w_r·(w_r + 2·Σ of the w below r); duels until there are n
        # distinct winners are a draw of n without replacement.
        duels = weights.log() + (weights + 2.0 * below).log()
        drawn = draw_without_replacement(duels, min(s.cd_items, pool.shape[1]), lists.generator)
        items = pool.gather(1, drawn)
        scores = lists.teacher_scores(items)
        return ItemSets(items, scores, (items != 0) & (scores != -torch.inf))

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """Binary cross-entropy with soft labels, from logits, summed over the items of a row."""
        if sets.teacher_scores is None:
            raise ValueError("CDLoss needs teacher_scores; see CDLoss.select.")
        label = torch.sigmoid(
            (sets.teacher_scores.detach() + self.settings.cd_label_shift)
            / self.settings.cd_label_scale
        )
        scores = at_least_float32(student_scores)
        if sets.keep is None:
            return (softplus(scores) - label * scores).sum(-1)
        # Masked before, so that nothing of a struck score is in the gradient; and after, since
        # softplus(0) is not 0.
        scores = scores.masked_fill(~sets.keep, 0.0)
        return (softplus(scores) - label * scores).masked_fill(~sets.keep, 0.0).sum(-1)
