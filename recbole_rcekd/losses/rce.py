r"""RCE-KD: cross-entropy on item sets that are closed, or nearly so.

For each user, with :math:`Q_T, Q_S` the top-K of teacher and student:

.. math::
    \ell_1 &= \mathrm{CE}_{Q_S}, \qquad \ell_2 = \mathrm{CE}_{A},
        \qquad A = (Q_T \setminus Q_S) \cup \text{samples} \\
    \ell   &= (1-\gamma)\,\ell_1 + \gamma\,\ell_2,
        \qquad \gamma = e^{-\beta\,|Q_T\cap Q_S|/|Q_T|}

where :math:`\mathrm{CE}_J = -\sum_{i\in J}\sigma_J(t/\tau)_i\log\sigma_J(s/\tau)_i`. An item set is
closed if it contains, with each item, all items that the student ranks above it. :math:`Q_S` is
closed. The samples make A nearly closed: L items of the student's top-M, drawn without replacement
with :math:`p_j\propto e^{z_j/T}`, where z is the number of items of :math:`Q_T\setminus Q_S` that
the student ranks below j. With ``rce_sampling_temperature: auto``, T is the value that leaves A
most nearly closed.

A teacher that lists fewer than K items has a shorter :math:`Q_T`; if it lists none, the loss is 0.

Source: Rejuvenating Cross-Entropy Loss in Knowledge Distillation for Recommender Systems, ICLR 2026
(arXiv 2509.20989); authors' code woriazzc/RCEKD @ 771322a. Where paper and code differ, the choice
is a setting; see METHODS.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from recbole_rcekd.core.closure import mean_closure_gaps
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.functional import (
    draw_without_replacement,
    is_member,
    mixed_cross_entropy,
    positions_in,
    soft_cross_entropy,
    votes_from_below,
)
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates

# The authors' code never counts more than this many votes (`playground.py` @ 771322a).
_CODE_MAX_VOTES = 50
# The values that `rce_sampling_temperature: auto` tries. There are at most K votes, so the last
# value is as good as uniform.
_TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
# The paper's value, used until `auto` has tried these.
_FIRST_TEMPERATURE = 10.0


@dataclass(frozen=True)
class RCEBaseSettings(LossSettings):
    """What the settings of :class:`RCELoss` and of its subclasses have in common."""

    def check_relations(self) -> None:
        """The samples and the student's top-K are taken from the pool, so it must be as long."""
        pool_key = f"{self.prefix}_pool"
        pool = getattr(self, pool_key)
        for key in (f"{self.prefix}_top_k", f"{self.prefix}_samples"):
            if getattr(self, key) > pool:
                raise SettingsError(
                    f"[{key}]={getattr(self, key)} is larger than [{pool_key}]={pool}, the number "
                    f"of items it is taken from. Raise {pool_key} or lower {key}."
                )

    def longest_list(self) -> tuple[str, ...]:
        """The student's top-M is the longest."""
        return (f"{self.prefix}_pool",)


@dataclass(frozen=True)
class RCESettings(RCEBaseSettings):
    """Settings of RCE-KD; ``properties/loss/rce.yaml`` documents each."""

    prefix = "rce"
    # Settings that were once here, with their defaults. Files and finished runs of that time name
    # them.
    retired: ClassVar[dict[str, Any]] = {
        "rce_tail_samples": 0,
        "rce_popularity_tilt": 0.0,
        "rce_rank_boost": 0.0,
        "rce_rank_boost_scale": 10.0,
        "rce_history_boost": 0.0,
    }

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


def blocker_votes(hits: Tensor, top_k: int, mode: str) -> Tensor:
    """z: how many items of the teacher the student ranks below each position, ``[n, M]``.

    Args:
        hits: which of the student's top-M, best first, are in Q_T, bool ``[n, M]``.
        top_k: K.
        mode: ``paper``: only Q_T∖Q_S votes, strictly below. (Its members that lie beyond M would
            add the same number everywhere, which cancels in p.) ``code``: all of Q_T inside the
            student's top-M votes, the position itself included, at most 50.
    """
    if mode == "code":
        return votes_from_below(hits, inclusive=True).clamp(max=_CODE_MAX_VOTES)
    missed = hits.clone()
    missed[:, :top_k] = False  # what lies in Q_S is not in Q_T without Q_S
    return votes_from_below(missed, inclusive=False)


def _marked(positions: Tensor, n: int) -> Tensor:
    """Which of the positions 0 to n − 1 occur in each row, bool ``[rows, n]``; −1 is none."""
    marks = torch.zeros((len(positions), n + 1), dtype=torch.bool, device=positions.device)
    return marks.scatter_(1, positions + 1, True)[:, 1:]


class RCELoss(KDLoss):
    """RCE-KD, and its ablations through ``rce_terms`` and ``rce_gamma``.

    Relations: ``rce_terms: l1`` is :class:`~recbole_rcekd.losses.ce.CELoss` on the student's top-K;
    with ``rce_samples: 0`` and ``rce_beta: 0`` it is cross-entropy on Q_T without Q_S.

    A subclass can have settings with another prefix: they are read by their names without it.

    Example:
        One user, K = 2: the teacher's top-2 is {1, 2}, the student's {2, 3}, and item 3 was drawn
        as the one sample. The scores are logarithms, so that the softmaxes are simple fractions.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.rce import RCELoss, RCESettings
        >>> loss = RCELoss(RCESettings(rce_top_k=2, rce_samples=1, rce_pool=3))
        >>> sets = ItemSets(
        ...     items=torch.tensor([[2, 3, 3, 1, 2]]),  # the student's top-2, the sample, Q_T
        ...     teacher_scores=torch.tensor([[2.0, 1.0, 1.0, 6.0, 2.0]]).log(),
        ...     keep=torch.tensor([[True, True, False]]),  # item 2 is in both top-2, so not in A
        ...     gamma=torch.tensor([0.5]),
        ... )
        >>> student_scores = torch.tensor([[3.0, 2.0, 2.0, 1.0, 3.0]]).log()
        >>> value = loss.forward(student_scores, sets)  # (0.6460 + 0.9996) / 2
        >>> round(value.item(), 4)
        0.8228
    """

    settings_type: ClassVar[type[RCEBaseSettings]] = RCESettings
    settings: RCEBaseSettings

    def __init__(self, settings: RCEBaseSettings) -> None:
        super().__init__(settings)
        self.top_k: int = self._setting("top_k")
        self.samples: int = self._setting("samples")
        self.pool: int = self._setting("pool")
        self.temperature = self._setting("temperature")
        self.beta: float = self._setting("beta")
        self.gamma: str = self._setting("gamma")
        self.gamma_value: float = self._setting("gamma_value")
        self.votes: str = self._setting("votes")
        self.terms: str = self._setting("terms")
        temperature = self._setting("sampling_temperature")
        self.tuned = temperature == "auto"
        self._sampling_temperature: float = _FIRST_TEMPERATURE if self.tuned else temperature

    def select(self, candidates: Candidates) -> ItemSets:
        """Columns ``[Q_S (K) | samples (L) | Q_T (K)]``, where each item of A is kept once.

        An item of Q_T that is in Q_S or among the samples is masked.
        """
        teacher_top = candidates.teacher_top(self.top_k)
        pool = candidates.student_top(self.pool)
        return self._sample(teacher_top, pool, self._sampling_temperature, candidates)

    def _sample(
        self, teacher_top: Tensor, pool: Tensor, temperature: float, candidates: Candidates
    ) -> ItemSets:
        """Draw the samples from the pool, the student's top-M, and make the item sets."""
        # If few items are allowed, a row of the pool ends with 0, which is no item.
        place = positions_in(pool, teacher_top).masked_fill_(pool == 0, -1)
        votes = blocker_votes(place >= 0, self.top_k, self.votes)
        log_weights = (votes / temperature).masked_fill_(pool == 0, -torch.inf)
        drawn = draw_without_replacement(log_weights, self.samples, candidates.generator)
        shared = _marked(place[:, : self.top_k], self.top_k)
        in_sample = _marked(place.gather(1, drawn), self.top_k)
        student_top, sampled = pool[:, : self.top_k], pool.gather(1, drawn)
        return self.build(student_top, sampled, teacher_top, shared, in_sample, candidates)

    def tune(self, candidates: Candidates) -> None:
        """Take the sampling temperature whose draws leave the smallest mean Δ (T3 of METHODS.md).

        All temperatures are tried with the same random numbers.
        """
        if len(candidates.contexts) == 0:
            return
        rows, state = candidates.student_scores_of_all(), candidates.generator.get_state()
        teacher_top = candidates.teacher_top(self.top_k)
        pool = candidates.student_top(self.pool)
        pairs = []
        for temperature in _TEMPERATURES:
            candidates.generator.set_state(state)
            pairs.append(
                self.closure_sets(self._sample(teacher_top, pool, temperature, candidates))
            )
        # The targets are the same for all temperatures: they are not drawn.
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
        candidates: Candidates,
    ) -> ItemSets:
        """Put student's top-K, samples and teacher's top-K side by side.

        Args:
            student_top: Q_S, ``[n, K]``.
            sampled: the samples, ``[n, L]``.
            teacher_top: Q_T, ``[n, K]``.
            shared: which of Q_T are in Q_S, bool ``[n, K]``.
            in_sample: which of Q_T are among the samples, bool ``[n, K]``.
            candidates: for the teacher's scores.
        """
        listed = teacher_top != 0
        taught = listed.any(1, keepdim=True)
        if self.terms in ("l1", "no_split"):
            student_top = student_top.masked_fill(~taught, 0)
        items = torch.cat([student_top, sampled, teacher_top], dim=1)
        keep = torch.cat([sampled != 0, ~(shared | in_sample) & listed], dim=1)
        if self.terms == "no_split":
            # One cross-entropy on the union: an item of the student's top-K that was drawn too
            # counts once.
            keep[:, : sampled.shape[1]] &= ~is_member(sampled, student_top)
        n_listed = listed.sum(1).clamp(min=1)
        overlap = shared.sum(1) / n_listed
        counted = in_sample.sum(1) / n_listed if self.gamma == "code" else overlap
        gamma = torch.exp(-self.beta * counted)
        if self.gamma == "constant":
            gamma = torch.full_like(gamma, self.gamma_value)
        # A user without items of the teacher gets γ = 1 and an empty A, so a loss of 0.
        return ItemSets(
            items=items,
            teacher_scores=candidates.teacher_scores(items).masked_fill(~taught, 0.0),
            keep=keep & taught,
            gamma=gamma.masked_fill(~taught.squeeze(1), 1.0),
            overlap=overlap,
        )

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """``(1 − γ)·ℓ1 + γ·ℓ2`` of each user."""
        k, tau, teacher = self.top_k, self.temperature, sets.teacher_scores
        if teacher is None or sets.keep is None or sets.gamma is None:
            raise ValueError("RCELoss needs teacher_scores, keep and gamma; see RCELoss.select.")
        if self.terms == "no_split":
            return soft_cross_entropy(student_scores, teacher, self._keep_all(sets), tau)
        if self.terms == "l1":
            return soft_cross_entropy(
                student_scores[:, :k], teacher[:, :k], sets.items[:, :k] != 0, tau
            )
        if self.terms == "l2":
            return soft_cross_entropy(student_scores[:, k:], teacher[:, k:], sets.keep, tau)
        return mixed_cross_entropy(
            student_scores, teacher, k, sets.gamma, self._keep_all(sets), tau
        )

    def closure_sets(self, sets: ItemSets) -> tuple[ItemSets, ItemSets]:
        """J = Q_T∖Q_S, and A, which is J and the samples: how well do the samples close J?

        With ``rce_terms: no_split`` A is the whole union; with ``l1`` both are the student's top-K.
        """
        k, items, teacher, keep = self.top_k, sets.items, sets.teacher_scores, sets.keep
        if teacher is None or keep is None:
            raise ValueError("RCELoss needs teacher_scores and keep; see RCELoss.select.")
        if self.terms == "l1":
            student_top = ItemSets(items[:, :k], teacher[:, :k], items[:, :k] != 0)
            return student_top, student_top
        columns = slice(k + self.samples, 2 * k + self.samples)
        teacher_top = items[:, columns]
        missed = ~is_member(teacher_top, items[:, :k]) & (teacher_top != 0)
        targets = ItemSets(teacher_top, teacher[:, columns], missed)
        if self.terms == "no_split":
            return targets, ItemSets(items, teacher, self._keep_all(sets))
        return targets, ItemSets(items[:, k:], teacher[:, k:], keep)

    def _keep_all(self, sets: ItemSets) -> Tensor:
        """The mask of all columns: of the student's top-K every real item counts."""
        return torch.cat([sets.items[:, : self.top_k] != 0, cast(Tensor, sets.keep)], dim=1)
