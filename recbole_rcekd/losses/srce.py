r"""SRCE-KD: RCE-KD with uniform samples besides, and with weights on the teacher's probabilities.

The loss is that of :mod:`recbole_rcekd.losses.rce` with two changes. Items drawn uniformly from
outside the teacher's top-K and the student's top-M join A (``srce_tail_samples``). And each item's
probability under the teacher is multiplied by a weight, before the probabilities are normalised on
an item set:

.. math:: w_i = (\mathrm{popularity}_i + 1)^{-\kappa} \cdot
    \big(1 + \alpha\,\sigma((\mathrm{rank}_i - K)/s)\big) \cdot
    \big(1 + \eta\,[i \text{ in the training history}]\big)

with κ = ``srce_popularity_tilt`` (popularity: training interactions of the item), α =
``srce_rank_boost``, s = ``srce_rank_boost_scale``, η = ``srce_history_boost``. The rank is the
student's; items beyond its top-M have rank M + 1. With κ, α, η and the uniform samples at 0 this is
RCE-KD.

Source: "SRCE-KD", an independent fork of the RCE-KD authors' code, after its description.
Approximate: its numbers were not compared. See METHODS.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from recbole_rcekd.core.functional import positions_in
from recbole_rcekd.core.settings import setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.rce import RCEBaseSettings, RCELoss


@dataclass(frozen=True)
class SRCESettings(RCEBaseSettings):
    """Settings of SRCE-KD; ``properties/loss/srce.yaml`` documents each.

    The first eleven are RCE-KD's.
    """

    prefix = "srce"

    srce_weight: float = setting(10.0, low=0.0)
    srce_top_k: int = setting(50, low=1)
    srce_samples: int = setting(50, low=0)
    srce_pool: int = setting(200, low=1)
    srce_temperature: float = setting(1.0, above=0.0)
    srce_sampling_temperature: float | Literal["auto"] = setting(10.0, above=0.0)
    srce_beta: float = setting(5.0, low=0.0)
    srce_gamma: Literal["paper", "code", "constant"] = "paper"
    srce_gamma_value: float = setting(0.5, low=0.0, high=1.0)
    srce_votes: Literal["paper", "code"] = "paper"
    srce_terms: Literal["full", "l1", "l2", "no_split"] = "full"
    srce_tail_samples: int = setting(10, low=0)
    srce_popularity_tilt: float = setting(0.1, low=0.0)
    srce_rank_boost: float = setting(0.0, low=0.0)
    srce_rank_boost_scale: float = setting(10.0, above=0.0)
    srce_history_boost: float = setting(0.0, low=0.0)


class SRCELoss(RCELoss):
    """SRCE-KD: the formula of :class:`~recbole_rcekd.losses.rce.RCELoss` on other item sets.

    The fork's *split mode* is the default here. Its *union mode* is ``srce_terms: no_split`` with
    ``srce_rank_boost`` and ``srce_history_boost``.

    Example:
        The user of RCE-KD's example, with item 4 drawn uniformly. ``select`` has put the weights
        into the teacher's scores already.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.srce import SRCELoss, SRCESettings
        >>> loss = SRCELoss(
        ...     SRCESettings(srce_top_k=2, srce_samples=1, srce_pool=3, srce_tail_samples=1)
        ... )
        >>> sets = ItemSets(
        ...     items=torch.tensor([[2, 3, 3, 1, 2, 4]]),  # Q_S, the sample, Q_T, the tail
        ...     teacher_scores=torch.tensor([[2.0, 1.0, 1.0, 6.0, 2.0, 1.0]]).log(),
        ...     keep=torch.tensor([[True, True, False, True]]),  # A = {3, 1, 4}
        ...     gamma=torch.tensor([1.0]),  # only the second term
        ... )
        >>> student_scores = torch.tensor([[3.0, 2.0, 2.0, 1.0, 3.0, 1.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # (ln 2 + 6 ln 4 + ln 4) / 8
        >>> round(value.item(), 4)
        1.2997
    """

    settings_type = SRCESettings
    settings: SRCESettings

    def _sample(
        self, teacher_top: Tensor, pool: Tensor, temperature: float, candidates: Candidates
    ) -> ItemSets:
        """RCE-KD's columns, with the uniform samples after them, and the weights."""
        sets = super()._sample(teacher_top, pool, temperature, candidates)
        if self.settings.srce_tail_samples:
            sets = self._with_tail(sets, teacher_top, pool, candidates)
        return self.weighted(sets, pool, candidates)

    def _with_tail(
        self, sets: ItemSets, teacher_top: Tensor, pool: Tensor, candidates: Candidates
    ) -> ItemSets:
        """Append items drawn uniformly from outside Q_T and the student's top-M."""
        outside = torch.cat([teacher_top, pool], dim=1)
        tail = candidates.draw(self.settings.srce_tail_samples, outside)
        taught = (teacher_top != 0).any(1, keepdim=True)
        scores = candidates.teacher_scores(tail).masked_fill(~taught, 0.0)
        return dataclasses.replace(
            sets,
            items=torch.cat([sets.items, tail], dim=1),
            teacher_scores=torch.cat([cast(Tensor, sets.teacher_scores), scores], dim=1),
            keep=torch.cat([cast(Tensor, sets.keep), (tail != 0) & taught], dim=1),
        )

    def weighted(self, sets: ItemSets, pool: Tensor, candidates: Candidates) -> ItemSets:
        """Multiply the teacher's probability of each item by its weight.

        That is, add τ · log w to the teacher's scores, which :meth:`forward` divides by τ.

        Args:
            sets: the item sets.
            pool: the student's top-M, best first, ``[n, M]``.
            candidates: for popularity and training history.
        """
        s, items = self.settings, sets.items
        scores = cast(Tensor, sets.teacher_scores)
        log_weights = torch.zeros_like(scores)
        if s.srce_popularity_tilt:
            popularity = candidates.popularity()[items].to(scores.dtype)
            log_weights -= s.srce_popularity_tilt * popularity.log1p()
        if s.srce_rank_boost:
            place = positions_in(items, pool)
            rank = 1 + place.masked_fill(place < 0, pool.shape[1]).to(scores.dtype)
            beyond = ((rank - self.top_k) / s.srce_rank_boost_scale).sigmoid()
            log_weights += (s.srce_rank_boost * beyond).log1p()
        if s.srce_history_boost:
            seen = candidates.is_seen(items).to(scores.dtype)
            log_weights += math.log1p(s.srce_history_boost) * seen
        return dataclasses.replace(sets, teacher_scores=scores + self.temperature * log_weights)
