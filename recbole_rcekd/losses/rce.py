r"""RCE-KD: cross-entropy on item sets that are closed, or nearly so.

For each user, with :math:`Q_T, Q_S` the top-K lists of teacher and student:

.. math::
    \ell_1 &= \mathrm{CE}_{Q_S}, \qquad \ell_2 = \mathrm{CE}_{A}, \quad A = (Q_T \setminus Q_S) \cup \text{samples} \\
    \ell   &= (1-\gamma)\,\ell_1 + \gamma\,\ell_2, \qquad \gamma = e^{-\beta\,|Q_T\cap Q_S|/|Q_T|}

where :math:`\mathrm{CE}_J = -\sum_{i\in J}\sigma_J(t/\tau)_i\log\sigma_J(s/\tau)_i`. The samples
are L of the student's top-M, drawn without replacement with :math:`p_j\propto e^{z_j/T}`, z the
number of :math:`Q_T\setminus Q_S` that the student ranks below j: likely blockers, which make A
almost closed. A teacher that lists fewer than K items has a shorter
:math:`Q_T`; with an empty one the loss is 0.

Variants: uniform items join A (``rce_tail_samples``), weights multiply the teacher's probabilities
(``rce_popularity_tilt``, ``rce_rank_boost``, ``rce_history_boost``), and T is the one that leaves A
most nearly closed (``auto``).

Source: Rejuvenating Cross-Entropy Loss in Knowledge Distillation for Recommender Systems, ICLR 2026
(arXiv 2509.20989); authors' code woriazzc/RCEKD @ 771322a. Where the two differ, each is a setting;
see METHODS.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from recbole_rcekd.core.closure import mean_closure_gaps
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.functional import (
    draw_without_replacement,
    is_member,
    mixed_cross_entropy,
    places,
    soft_cross_entropy,
    votes_from_below,
)
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates

# The authors' code never counts more than this many votes (`playground.py` @ 771322a).
_CODE_MAX_VOTES = 50
# What `rce_sampling_temperature: auto` tries. Votes are at most K, so the last is as good as
# uniform.
_TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
# Until it was tuned: the paper's.
_FIRST_TEMPERATURE = 10.0


@dataclass(frozen=True)
class RCESettings(LossSettings):
    """Settings of RCE-KD; ``properties/loss/rce.yaml`` gives type, purpose and source of each."""

    prefix = "rce"

    rce_weight: float = setting(10.0, low=0.0)
    rce_top_k: int = setting(50, low=1)
    rce_samples: int = setting(50, low=0)
    rce_pool: int = setting(200, low=1)
    rce_temperature: float = setting(1.0, above=0.0)
    rce_sampling_temperature: float | Literal["auto"] = setting(10.0, above=0.0)
    rce_beta: float = setting(5.0, low=0.0)
    rce_gamma: Literal["paper", "code", "constant"] = "paper"
    rce_gamma_value: float = setting(0.5, low=0.0, high=1.0)
    rce_votes: Literal["paper", "code"] = "paper"
    rce_terms: Literal["full", "l1", "l2", "no_split"] = "full"
    rce_tail_samples: int = setting(0, low=0)
    rce_popularity_tilt: float = setting(0.0, low=0.0)
    rce_rank_boost: float = setting(0.0, low=0.0)
    rce_rank_boost_scale: float = setting(10.0, above=0.0)
    rce_history_boost: float = setting(0.0, low=0.0)

    def check_relations(self) -> None:
        """The samples and the student's top-K both come out of the pool."""
        for key in ("rce_top_k", "rce_samples"):
            if getattr(self, key) > self.rce_pool:
                raise SettingsError(
                    f"[{key}]={getattr(self, key)} is larger than [rce_pool]={self.rce_pool}, the "
                    f"student's list it is taken from. Raise rce_pool or lower {key}."
                )

    def longest_list(self) -> tuple[str, ...]:
        """The pool is the longest list."""
        return ("rce_pool",)


def blocker_votes(hits: Tensor, top_k: int, mode: str) -> Tensor:
    """z: how many teacher items the student ranks below each position of its pool, ``[n, M]``.

    Args:
        hits: which of the student's top-M, best first, are in Q_T, bool ``[n, M]``.
        top_k: K.
        mode: ``paper``: only Q_T∖Q_S votes, strictly below. (Members of it that lie beyond M would
            add the same number everywhere, which cancels in p.) ``code``: all of Q_T inside the
            pool, the position itself included, at most 50.
    """
    if mode == "code":
        return votes_from_below(hits, inclusive=True).clamp(max=_CODE_MAX_VOTES)
    missed = hits.clone()
    missed[:, :top_k] = False  # what lies in Q_S is not in Q_T without Q_S
    return votes_from_below(missed, inclusive=False)


def _marked(place: Tensor, n: int) -> Tensor:
    """Bool ``[rows, n]``: which of n places occur in ``place``, where −1 is none."""
    marks = torch.zeros((len(place), n + 1), dtype=torch.bool, device=place.device)
    return marks.scatter_(1, place + 1, True)[:, 1:]


class RCELoss(KDLoss):
    """RCE-KD, and its ablations through ``rce_terms`` and ``rce_gamma``.

    Relations: ``rce_terms: l1`` is :class:`~recbole_rcekd.losses.ce.CELoss` on the student's top-K;
    with ``rce_samples: 0`` and ``rce_beta: 0`` it is cross-entropy on Q_T without Q_S.
    """

    settings_type = RCESettings
    settings: RCESettings

    def __init__(self, settings: RCESettings) -> None:
        super().__init__(settings)
        temperature = settings.rce_sampling_temperature
        self.tuned = temperature == "auto"
        self.temperature = settings.rce_temperature
        self._sampling_temperature = _FIRST_TEMPERATURE if temperature == "auto" else temperature

    def select(self, lists: Candidates) -> ItemSets:
        """Columns ``[Q_S (K) | samples (L) | tail | Q_T (K)]``; Q_T is masked where it is already in one of the others."""
        s = self.settings
        teacher_top, pool = lists.teacher_top(s.rce_top_k), lists.student_top(s.rce_pool)
        return self._select(teacher_top, pool, self._sampling_temperature, lists)

    def _select(
        self, teacher_top: Tensor, pool: Tensor, temperature: float, lists: Candidates
    ) -> ItemSets:
        s = self.settings
        # Rows to which little is allowed have short lists, with 0 at the end, which is no item.
        place = places(pool, teacher_top).masked_fill_(pool == 0, -1)
        votes = blocker_votes(place >= 0, s.rce_top_k, s.rce_votes)
        log_weights = (votes / temperature).masked_fill_(pool == 0, -torch.inf)
        drawn = draw_without_replacement(log_weights, s.rce_samples, lists.generator)
        shared = _marked(place[:, : s.rce_top_k], s.rce_top_k)
        in_sample = _marked(place.gather(1, drawn), s.rce_top_k)
        sampled = pool.gather(1, drawn)
        if s.rce_tail_samples:
            tail = lists.draw(s.rce_tail_samples, outside=torch.cat([teacher_top, pool], dim=1))
            sampled = torch.cat([sampled, tail], dim=1)
        sets = self.build(pool[:, : s.rce_top_k], sampled, teacher_top, shared, in_sample, lists)
        return self._weighted(sets, pool, lists)

    def _weighted(self, sets: ItemSets, pool: Tensor, lists: Candidates) -> ItemSets:
        """The log of each item's target weight goes to the teacher's score, times τ, by which :meth:`forward` divides."""
        s, items = self.settings, sets.items
        scores = cast(Tensor, sets.teacher_scores)
        weights: Tensor | float = 0.0
        if s.rce_popularity_tilt:
            weights -= s.rce_popularity_tilt * lists.popularity()[items].to(scores.dtype).log1p()
        if s.rce_rank_boost:
            place = places(items, pool)
            # Beyond the pool: the rank after it.
            rank = 1 + place.masked_fill(place < 0, pool.shape[1]).to(scores.dtype)
            weights += (
                s.rce_rank_boost * ((rank - s.rce_top_k) / s.rce_rank_boost_scale).sigmoid()
            ).log1p()
        if s.rce_history_boost:
            weights += math.log1p(s.rce_history_boost) * lists.is_seen(items).to(scores.dtype)
        return dataclasses.replace(sets, teacher_scores=scores + s.rce_temperature * weights)

    def tune(self, lists: Candidates) -> None:
        """Take the sampling temperature whose draws leave the smallest mean Δ (METHODS.md, T3), with the same noise for all."""
        if len(lists.contexts) == 0:
            return
        s = self.settings
        rows, state = lists.student_scores_of_all(), lists.generator.get_state()
        teacher_top, pool = lists.teacher_top(s.rce_top_k), lists.student_top(s.rce_pool)
        pairs = []
        for temperature in _TEMPERATURES:
            lists.generator.set_state(state)
            pairs.append(self.closure_sets(self._select(teacher_top, pool, temperature, lists)))
        # The targets are the same in all: they are not drawn.
        gaps = mean_closure_gaps(
            pairs[0][0], [support for _, support in pairs], rows, self.temperature
        )
        self._sampling_temperature = _TEMPERATURES[gaps.index(min(gaps))]

    def metrics(self) -> dict[str, float]:
        """``sampling_temperature``, where it is tuned."""
        return {"sampling_temperature": self._sampling_temperature} if self.tuned else {}

    def build(
        self,
        student_top: Tensor,
        sampled: Tensor,
        teacher_top: Tensor,
        shared: Tensor,
        in_sample: Tensor,
        lists: Candidates,
    ) -> ItemSets:
        """Lay the three lists out in columns, with the mask, γ and the teacher's scores."""
        s = self.settings
        listed = teacher_top != 0
        taught = listed.any(1, keepdim=True)
        if s.rce_terms in ("l1", "no_split"):
            student_top = student_top.masked_fill(~taught, 0)
        items = torch.cat([student_top, sampled, teacher_top], dim=1)
        keep = torch.cat([sampled != 0, ~(shared | in_sample) & listed], dim=1)
        if s.rce_terms == "no_split":
            # One cross-entropy on the union: the student's top-K counts once, whether it was drawn
            # or not.
            keep[:, : sampled.shape[1]] &= ~is_member(sampled, student_top)
        n_listed = listed.sum(1).clamp(min=1)
        overlap = shared.sum(1) / n_listed
        counted = in_sample.sum(1) / n_listed if s.rce_gamma == "code" else overlap
        gamma = torch.exp(-s.rce_beta * counted)
        if s.rce_gamma == "constant":
            gamma = torch.full_like(gamma, s.rce_gamma_value)
        # Of whom the teacher says nothing: all weight on the second term, which keeps nothing, so
        # it is 0.
        return ItemSets(
            items=items,
            teacher_scores=lists.teacher_scores(items).masked_fill(~taught, 0.0),
            keep=keep & taught,
            gamma=gamma.masked_fill(~taught.squeeze(1), 1.0),
            overlap=overlap,
        )

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """``(1 − γ)·ℓ1 + γ·ℓ2`` per row."""
        k, tau, teacher = self.settings.rce_top_k, self.temperature, sets.teacher_scores
        if teacher is None or sets.keep is None or sets.gamma is None:
            raise ValueError("RCELoss needs teacher_scores, keep and gamma; see RCELoss.select.")
        terms = self.settings.rce_terms
        if terms == "no_split":
            return soft_cross_entropy(student_scores, teacher, self._keep_all(sets), tau)
        if terms == "l1":
            return soft_cross_entropy(
                student_scores[:, :k], teacher[:, :k], sets.items[:, :k] != 0, tau
            )
        if terms == "l2":
            return soft_cross_entropy(student_scores[:, k:], teacher[:, k:], sets.keep, tau)
        return mixed_cross_entropy(
            student_scores, teacher, k, sets.gamma, self._keep_all(sets), tau
        )

    def closure_sets(self, sets: ItemSets) -> tuple[ItemSets, ItemSets]:
        """J = what the student misses of the teacher's top-K, A = J and the samples: how well the draw closes it.

        With ``rce_terms: no_split`` A is the whole union; with ``l1`` both are the student's top-K.
        """
        s = self.settings
        k, n_drawn = s.rce_top_k, s.rce_samples + s.rce_tail_samples
        items, teacher, keep = sets.items, sets.teacher_scores, sets.keep
        if teacher is None or keep is None:
            raise ValueError("RCELoss needs teacher_scores and keep; see RCELoss.select.")
        if s.rce_terms == "l1":
            student_top = ItemSets(items[:, :k], teacher[:, :k], items[:, :k] != 0)
            return student_top, student_top
        teacher_top = items[:, k + n_drawn :]
        missed = ~is_member(teacher_top, items[:, :k]) & (teacher_top != 0)
        targets = ItemSets(teacher_top, teacher[:, k + n_drawn :], missed)
        if s.rce_terms == "no_split":
            return targets, ItemSets(items, teacher, self._keep_all(sets))
        return targets, ItemSets(items[:, k:], teacher[:, k:], keep)

    def _keep_all(self, sets: ItemSets) -> Tensor:
        """The mask of all columns: the student's top-K counts in full, where there is one."""
        return torch.cat(
            [sets.items[:, : self.settings.rce_top_k] != 0, cast(Tensor, sets.keep)], dim=1
        )
