r"""HetComp: learn from earlier checkpoints of the teacher first, easy before hard.

The checkpoints of a teacher's training are its *trajectory*; the teacher itself is the last one.
Each user learns from one checkpoint of each teacher: from the least trained one at first, and from
the next one as soon as the student comes near to that (:meth:`HetCompLoss.select`). :math:`Q` are
the top-K unseen items of the current checkpoints, P some training items, and R(A) all items that
are neither seen nor in A. As long as any user learns from an earlier checkpoint, the loss ignores
the order of the items:

.. math:: \ell_\text{easy} = 2 \sum_{i\in P\cup Q}
    -\log \frac{e^{s_i}}{e^{s_i} + \sum_{j\in R(Q)} e^{s_j}}

After that it learns the order, with PL(A; R) the Plackett–Luce loss of picking A in its order
before anything of R:

.. math:: \ell_\text{hard} = \mathrm{PL}(P; R(Q_{K/2}))
    + \tfrac12 \big[\mathrm{PL}(Q_{K/2}; R(Q_{K/2})) + \mathrm{PL}(Q_{K/10}; R(Q_{K/10}))\big]

Source: Kang et al., Distillation from Heterogeneous Models for Top-K Recommendation, WWW 2023;
woriazzc/RCEKD @ 771322a. The authors subtract exponentials, which needs scores cut at ±40; here the
sums are taken over the remaining items directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.functional import at_least_float32, plackett_luce, positions_in
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets, Seen
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates

# So many top items are compared. An item at position k weighs e^(−k/10), both when rankings are
# compared and when they are merged.
_COMPARED = 50
_FALL = 10.0
# With each interval, going on to the next checkpoint needs a little less.
_DECAY = 0.995


@dataclass(frozen=True)
class HetCompSettings(LossSettings):
    """Settings of HetComp; ``properties/loss/hetcomp.yaml`` documents each.

    Raises:
        SettingsError: ``hetcomp_checkpoints`` is no list of files.
    """

    prefix = "hetcomp"

    hetcomp_weight: float = setting(0.005, low=0.0)
    hetcomp_top_k: int = setting(100, low=10)
    hetcomp_objective: Literal["dynamic", "easy", "hard"] = "dynamic"
    hetcomp_interval: int = setting(8, low=1)
    hetcomp_alpha: float = setting(1.05, above=0.0)
    hetcomp_checkpoints: list[str] = field(default_factory=list)

    def _check_type(self, name: str, hint: Any) -> None:
        if name != "hetcomp_checkpoints":
            super()._check_type(name, hint)
            return
        given: Any = self.hetcomp_checkpoints
        files = (
            [part.strip() for part in given.split(",") if part.strip()]
            if isinstance(given, str)
            else given
        )
        if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
            raise SettingsError(
                f"[hetcomp_checkpoints] is {given!r}, but must be a list of files, the least "
                "trained first; write it as hetcomp_checkpoints: [epoch-10.pth, epoch-20.pth], for "
                "example."
            )
        object.__setattr__(self, name, list(files))

    def longest_list(self) -> tuple[str, ...]:
        """One top-K."""
        return ("hetcomp_top_k",)


class HetCompLoss(KDLoss):
    """HetComp. Training items are in P only.

    Attributes:
        hard: whether the loss learns the order now: all users have reached the last checkpoint of
            each teacher.
        stage: the number of the checkpoint that each user learns from, for each teacher,
            ``[n_contexts, n_teachers]``.

    Example:
        Twelve items. Item 1 is the training item, items 2 to 11 are the top-10 of the checkpoint,
        so only item 12 remains. The student scores all items the same.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets, Seen
        >>> from recbole_rcekd.losses.hetcomp import HetCompLoss, HetCompSettings
        >>> loss = HetCompLoss(HetCompSettings(hetcomp_top_k=10, hetcomp_objective="easy"))
        >>> sets = ItemSets(
        ...     items=torch.arange(1, 12).unsqueeze(0),
        ...     seen=Seen.from_pairs(torch.tensor([0]), torch.tensor([1]), 1, 13),
        ... )
        >>> student_scores = torch.zeros(1, 13)  # column 0 is no item
        >>> value = loss.forward(student_scores, sets)  # 2 · 11 ln 2
        >>> round(value.item(), 4)
        15.2492
    """

    settings_type = HetCompSettings
    settings: HetCompSettings
    scores_all_items = True
    masks_seen = True
    uses_trajectory = True

    def __init__(self, settings: HetCompSettings) -> None:
        super().__init__(settings)
        self.checkpoints = settings.hetcomp_checkpoints
        self.stage = torch.zeros((0, 0), dtype=torch.int64)
        # The discrepancy from the next checkpoint when the user came to the current one.
        self._stored = torch.zeros((0, 0))
        self._looked = torch.zeros(0, dtype=torch.int64)
        self._arrived: bool | None = False

    @property
    def hard(self) -> bool:
        """Whether the loss learns the order now."""
        objective = self.settings.hetcomp_objective
        return objective == "hard" or (objective == "dynamic" and bool(self._arrived))

    def prepare(self, n_contexts: int, device: torch.device) -> None:
        """Begin with the first checkpoint for every user."""
        self._looked = torch.full((n_contexts,), -1, dtype=torch.int64, device=device)
        self.stage = self.stage.new_zeros((n_contexts, 0), device=device)
        self._arrived = False

    def get_extra_state(self) -> dict[str, Tensor]:
        """Which checkpoint each user learns from.

        It is saved with the parameters of losses, so that a resumed run goes on where it was.
        """
        return {"stage": self.stage, "stored": self._stored, "looked": self._looked}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`get_extra_state` gave.

        Raises:
            RuntimeError: it belongs to another number of users.
        """
        if state["looked"].shape != self._looked.shape:
            raise RuntimeError(
                f"HetComp's saved state has {len(state['looked'])} users or rows, but this "
                f"training has {len(self._looked)}."
            )
        device = self._looked.device
        self.stage, self._stored, self._looked = (
            state[name].to(device) for name in ("stage", "stored", "looked")
        )
        self._arrived = None  # computed in the next select

    def select(self, candidates: Candidates) -> ItemSets:
        """``[P (K/10) | Q (K), best first]``; 0 where there are fewer.

        Every ``hetcomp_interval`` epochs the student's top items are compared with those of each
        user's next checkpoint. The user goes on to it if their discrepancy has fallen by the factor
        α·0.995^n since the user came to the current checkpoint (n: how many intervals are over), or
        if it has grown.

        The top items of several teachers are merged: an item weighs Σ e^(−k/10) over its positions
        k.
        """
        trajectories = candidates.trajectories()
        if not trajectories or any(len(states) < 2 for states in trajectories):
            raise ValueError(
                "HetCompLoss needs earlier checkpoints of each teacher; see "
                "Candidates.trajectories."
            )
        if self.stage.shape[1] != len(trajectories):
            self.stage = self.stage.new_zeros((len(self._looked), len(trajectories)))
            self._stored = torch.full(self.stage.shape, torch.nan, device=self.stage.device)
        self._move_on(candidates, trajectories)
        k = self.settings.hetcomp_top_k
        by_teacher = [
            self._top_of_states(candidates, n, states) for n, states in enumerate(trajectories)
        ]
        top = by_teacher[0] if len(by_teacher) == 1 else most_important(by_teacher, k)
        positives = candidates.positives(k // 10).masked_fill((top == 0).all(1, keepdim=True), 0)
        return ItemSets(torch.cat([positives, top], dim=1))

    def _top_of_states(
        self, candidates: Candidates, teacher: int, states: Sequence[Candidates]
    ) -> Tensor:
        """The top-K of each user's current checkpoint."""
        stage = self.stage[candidates.ids, teacher]
        top = torch.zeros(
            (len(stage), self.settings.hetcomp_top_k), dtype=torch.int64, device=stage.device
        )
        for number, state in enumerate(states):
            rows = (stage == number).nonzero().squeeze(1)
            found = self._top_of_state(state.part(rows), top.shape[1])
            top[rows, : found.shape[1]] = found
        return top

    def _top_of_state(self, state: Candidates, k: int) -> Tensor:
        """The top-k unseen items of one checkpoint.

        They are always asked for at the same, greater depth, so that they are computed once.
        """
        return state.teacher_top(max(_COMPARED, self.settings.hetcomp_top_k), unseen=True)[:, :k]

    def _move_on(
        self, candidates: Candidates, trajectories: Sequence[Sequence[Candidates]]
    ) -> None:
        interval = self.settings.hetcomp_interval
        self._looked[candidates.ids] = self._looked[candidates.ids].clamp(min=0)
        ends = self.stage.new_tensor([len(states) - 1 for states in trajectories])
        if self._arrived is None:
            self._arrived = self._all_at(ends)
        due = (candidates.epoch - self._looked[candidates.ids] >= interval).nonzero().squeeze(1)
        if self._arrived or len(due) == 0:
            return
        ids = candidates.ids[due]
        self._looked[ids] = candidates.epoch
        student = candidates.part(due).student_top(_COMPARED, unseen=True)
        factor = self.settings.hetcomp_alpha * _DECAY ** (candidates.epoch // interval)
        for teacher, states in enumerate(trajectories):
            # From the checkpoints 1, 2, …; no user goes back to 0.
            apart = torch.stack(
                [
                    discrepancy(student, self._top_of_state(state.part(due), _COMPARED))
                    for state in states[1:]
                ],
                dim=1,
            )
            last = len(states) - 1
            stage, stored = self.stage[ids, teacher], self._stored[ids, teacher]
            now = apart.gather(1, stage.clamp(max=last - 1).unsqueeze(1)).squeeze(1)
            # "At least", not "above": a user whose discrepancy is 0 (the student agrees, or the
            # teacher lists nothing) goes on. At the first look NaN is stored, and no user goes on.
            moves = (stage < last) & ((stored >= factor * now) | (stored < now))
            stage = stage + moves
            following = apart.gather(1, stage.clamp(max=last - 1).unsqueeze(1)).squeeze(1)
            self.stage[ids, teacher] = stage
            self._stored[ids, teacher] = following.where(moves | stored.isnan(), stored)
        self._arrived = self._all_at(ends)

    def _all_at(self, ends: Tensor) -> bool:
        return bool((self.stage >= ends)[self._looked >= 0].all())

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The loss of each user.

        Args:
            student_scores: ``[B, N]``, column 0 is padding.
            sets: with ``seen``, as ``masks_seen`` asks for it.
        """
        if sets.seen is None:
            raise ValueError("HetCompLoss needs seen; see KDLoss.masks_seen.")
        scores, items, k = (
            at_least_float32(student_scores),
            sets.items.long(),
            self.settings.hetcomp_top_k,
        )
        keep = items != 0
        listed = scores.gather(1, items).masked_fill(~keep, 0.0)
        first = items.shape[1] - k
        if not self.hard:
            rest = _log_sum_of_rest(scores, sets.seen, items[:, first:])
            terms = torch.nn.functional.softplus(rest - listed)
            return 2.0 * terms.masked_fill(~keep, 0.0).sum(1)
        positives, positives_keep = listed[:, :first], keep[:, :first]
        half, half_keep = listed[:, first : first + k // 2], keep[:, first : first + k // 2]
        rest = _log_sum_of_rest(scores, sets.seen, items[:, first : first + k // 2])
        # Below the first tenth are the other items of the half, and all remaining items as one
        # entry.
        below = torch.cat([half[:, k // 10 :], rest], dim=1)
        below_keep = torch.cat([half_keep[:, k // 10 :], torch.ones_like(half_keep[:, :1])], dim=1)
        return plackett_luce(positives, rest, positives_keep) + 0.5 * (
            plackett_luce(half, rest, half_keep)
            + plackett_luce(half[:, : k // 10], below, half_keep[:, : k // 10], below_keep)
        )


def _log_sum_of_rest(scores: Tensor, seen: Seen, items: Tensor) -> Tensor:
    """Log Σ e^s over the items that are neither seen nor in ``items [B, T]``: ``[B, 1]``.

    Very low where there is no such item.
    """
    left_out = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, items, True)
    left_out[seen.cells(torch.arange(len(scores), device=scores.device))] = True
    left_out[:, 0] = True
    return scores.masked_fill(left_out, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)


def discrepancy(student_top: Tensor, target_top: Tensor) -> Tensor:
    r"""How far the student's top items are from others: 0 if they are equal, 1 if disjoint.

    .. math:: 1 - \mathrm{NDCG}, \text{ with gains } 2^{e^{-k/10}} - 1
        \text{ at position } k = 1, 2, \dots \text{ of the target}

    Args:
        student_top: ``[n, a]``, best first; 0 for none.
        target_top: ``[n, k]``, best first; 0 for none. If it has no item, the discrepancy is 0.

    Returns:
        ``[n]``.
    """
    device, longest = student_top.device, max(student_top.shape[1], target_top.shape[1])
    place = torch.arange(1, longest + 1, device=device)
    gain, discount = torch.exp2((-place / _FALL).exp()) - 1.0, 1.0 / torch.log2(place + 1.0)
    ideal = ((gain * discount)[: target_top.shape[1]] * (target_top != 0)).sum(1)
    hit = positions_in(student_top, target_top)
    counts = (hit >= 0) & (student_top != 0)
    found = (gain[hit.clamp(min=0)] * discount[: student_top.shape[1]] * counts).sum(1)
    return (1.0 - found / ideal).where(ideal > 0, 0.0)


def most_important(rankings: Sequence[Tensor], k: int) -> Tensor:
    """The ``k`` items that several rankings agree on, ``[n, k]``.

    Those with the largest Σ e^(−position/10) over the rankings.

    Args:
        rankings: each ``[n, K]``, best first; 0 for none.
        k: how many items to take.
    """
    items = torch.cat(list(rankings), dim=1)
    place = torch.cat(
        [torch.arange(1, each.shape[1] + 1, device=items.device) for each in rankings]
    )
    ordered, order = items.sort(1)
    weight = (-place.double() / _FALL).exp()[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # The weights of an item are added up at its first occurrence.
    column = torch.arange(items.shape[1], device=items.device) * first
    total = torch.zeros_like(weight).scatter_add_(1, column.cummax(1).values, weight)
    best, column = total.masked_fill(~first | (ordered == 0), -1.0).topk(k, dim=1)
    return ordered.gather(1, column).masked_fill(best < 0, 0)
