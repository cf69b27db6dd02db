"""Distillation of a student that scores users.

The candidates of the users are chosen once per epoch or less often. A plan says which users learn
in which step, and each step computes their KD loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.full_softmax import sum_over_blocks
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import ItemSets, Seen, TeacherScores
from recbole_rcekd.losses.base import TUNED_ON, KDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.models.product_recorder import Product
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.training.diagnostics import DiagnosticUsers, closure_metrics
from recbole_rcekd.training.distiller import Distiller

# Candidates are chosen for so many users at a time. The memory for each user is that of a few top-K
# lists, never that of a full row.
_REFRESHED_AT_A_TIME = 1024
# So many scores of full rows are computed at a time, with gradient: 128 MB of float32.
_SCORED_AT_A_TIME = 32_000_000


@dataclass
class _Side:
    """One side of the distillation, on this rank: items for users, or (IR-RRD) users for items.

    For the second side, read "item" for "user" and "user" for "item" here.

    Attributes:
        loss: the method.
        weight: the weight of this side.
        teacher: the teacher's scores.
        seen: the training interactions.
        score: the student's scores of some items for some users.
        score_all: the student's scores of all items for some users.
        contexts: the users of this rank.
        n_of_ranks: how many users each rank has.
        sets: what the loss chose for the users of this rank, in their order.
        row_of: the position of each user in ``contexts``; −1 for users of other ranks.
        group: the group of each user of this rank; a group is refreshed in the same epoch.
        popularity: how many training interactions each item has.
    """

    loss: KDLoss
    weight: float
    teacher: TeacherScores
    seen: Seen
    score: Callable[[Tensor, Tensor], Tensor]
    score_all: Callable[[Tensor], Tensor]
    contexts: Tensor
    n_of_ranks: list[int]
    sets: ItemSets | None = None
    row_of: Tensor = field(init=False)
    group: Tensor = field(init=False)
    popularity: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.popularity = torch.bincount(self.seen.ids, minlength=self.seen.n_ids)
        self.loss.prepare(len(self.seen.starts) - 1, self.contexts.device)
        self.row_of = torch.full(
            (len(self.seen.starts) - 1,), -1, dtype=torch.int64, device=self.contexts.device
        )
        self.row_of[self.contexts] = torch.arange(len(self.contexts), device=self.contexts.device)


class UserDistiller(Distiller):
    """The KD term of one training run, or this rank's part of it.

    With several ranks, each rank has the candidates of its own users only. RecBole averages the
    gradients of the ranks. So each part is weighted such that the *average* of all parts is the
    mean over the users of all ranks.

    Args:
        scorer: the student.
        teacher: the teacher's scores.
        loss: the method.
        settings: ``kd_schedule``, ``kd_refresh_epochs`` and ``kd_diagnostic_users`` are used.
        seen: the training interactions.
        seed: the seed of all random draws. They come from a generator of their own, so RecBole's
            random stream stays the same.
        ranks: this process among those that train the student.
        trajectories: the states of each teacher, for losses that use them; the teacher itself is
            the last.
        user_field: the column of a batch with the users.
    """

    loss: KDLoss

    def __init__(
        self,
        scorer: ModelScorer,
        teacher: TeacherScores,
        loss: KDLoss,
        settings: KDSettings,
        seen: Seen,
        seed: int,
        ranks: Ranks | None = None,
        trajectories: Sequence[Sequence[TeacherScores]] = (),
        user_field: str = "user_id",
    ) -> None:
        loss.settings.check_catalogue(teacher.n_items - 1)
        super().__init__(loss, scorer, seed, ranks)
        self._trajectories = trajectories
        self.settings = settings
        self._user_field = user_field
        ranks = self._ranks
        seen = seen.to(scorer.device)
        contexts = seen.contexts()
        own, counts = ranks.own(contexts), ranks.counts(contexts)
        self._sides = [_Side(loss, 1.0, teacher, seen, scorer.score, scorer.score_all, own, counts)]
        item_side = loss.item_side()
        if item_side is not None:
            by_item, owners = teacher.transposed(), seen.transposed()
            self._sides.append(
                _Side(
                    *item_side,
                    by_item,
                    owners,
                    scorer.score_by_item,
                    scorer.score_all,
                    ranks.own(owners.contexts()),
                    ranks.counts(owners.contexts()),
                )
            )
        for side in self._sides:
            order = torch.randperm(
                len(side.contexts), generator=self.generator, device=scorer.device
            )
            side.group = order % settings.kd_refresh_epochs
        self._plans: list[Iterator[tuple[Tensor, float]]] = []
        n_diagnostic = -(-settings.kd_diagnostic_users // ranks.world)
        self._diagnostic_users = DiagnosticUsers(n_diagnostic, own, teacher, self.generator)

    # -- once per epoch ----------------------------------------------------------------------------

    def _prepare(self, epoch: int, n_steps: int) -> None:
        """Choose the candidates of the users whose turn it is, and plan the users of each step."""
        # DiffRec, for example, draws noise in evaluation too, which must not shift RecBole's random
        # stream.
        with preserved_random_state(), self._scorer.evaluating():
            for side in self._sides:
                if side.loss.tuned:
                    side.loss.tune(self._lists(side, self._some_of(side), epoch))
                self._refresh(side, epoch)
        self._plans = [self._partition(side, n_steps) for side in self._sides]

    def _refresh(self, side: _Side, epoch: int) -> None:
        if side.sets is None:
            due = torch.arange(len(side.contexts), device=side.contexts.device)
        elif side.loss.renewed:
            due = (side.group == epoch % self.settings.kd_refresh_epochs).nonzero().squeeze(1)
        else:
            return
        whole = self._lists(side, due, epoch)
        for part in torch.split(torch.arange(len(due), device=due.device), _REFRESHED_AT_A_TIME):
            block = side.loss.select(whole.part(part))
            if side.sets is None:
                side.sets = block.empty_like(len(side.contexts))
            side.sets.put(due[part], block)

    def _lists(self, side: _Side, rows: Tensor, epoch: int) -> Candidates:
        return Candidates(
            side.contexts[rows],
            side.teacher,
            self._scorer.ranking(),
            side.seen,
            self.generator,
            score=side.score,
            score_all=side.score_all,
            popularity=side.popularity,
            trajectories=self._trajectories if side is self._sides[0] else (),
            epoch=epoch,
        )

    def _some_of(self, side: _Side) -> Tensor:
        """The positions of a few random users, others in each epoch."""
        device = self.generator.device
        return torch.randperm(len(side.contexts), generator=self.generator, device=device)[
            :TUNED_ON
        ]

    def _partition(self, side: _Side, n_steps: int) -> Iterator[tuple[Tensor, float]]:
        """Plan the users of each step: each user once in ``n_steps`` steps, in random order.

        If there are more steps, the plan begins anew.

        Yields:
            The positions of a step's users, and the mean number of users that the ranks have in
            this step.
        """
        device, n_parts = self.generator.device, max(1, n_steps)
        # The same lengths as those of tensor_split on each rank.
        means = [
            sum((n + n_parts - 1 - i) // n_parts for n in side.n_of_ranks) / self._ranks.world
            for i in range(n_parts)
        ]
        while True:
            order = torch.randperm(len(side.contexts), generator=self.generator, device=device)
            yield from zip(order.tensor_split(n_parts), means, strict=True)

    # -- once per step -----------------------------------------------------------------------------

    def _kd_loss(self, batch: Any, products: Sequence[Product]) -> Tensor:
        """The KD loss of the users that are planned for this step, or are in the batch.

        With ``kd_schedule: interactions`` they are those in the batch. The ranks share their
        batches then, because a rank's batch has users of all ranks.
        """
        terms = []
        for side, plan in zip(self._sides, self._plans, strict=True):
            if self.settings.kd_schedule == "interactions" and side is self._sides[0]:
                rows, weights = self._rows_of_batch(side, batch[self._user_field])
                term = self._sum(side, rows, weights) if len(rows) else None
            else:
                rows, mean_length = next(plan)
                # With one process this is the mean over the rows.
                term = self._sum(side, rows) / mean_length if len(rows) else None
            if term is not None:
                terms.append(term if side.weight == 1.0 else side.weight * term)
        return sum(terms[1:], terms[0]) if terms else torch.zeros((), device=self.generator.device)

    def _rows_of_batch(self, side: _Side, users: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of a batch's users that belong to this rank, and their weights.

        A user that is in the batch c times is scored once, and has c times the weight.
        """
        users = self._ranks.joined(users)
        distinct, counts = torch.unique(users[users != 0], return_counts=True)
        rows = side.row_of[distinct]
        known = rows >= 0
        return rows[known], counts[known] * self._ranks.world / max(1, int(counts.sum()))

    def _sum(self, side: _Side, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ weights · losses of the users at the positions ``rows``."""
        if side.sets is None:
            raise RuntimeError("begin_epoch comes before step")
        contexts, sets = side.contexts[rows], side.sets.rows(rows)
        if not side.loss.scores_all_items:
            return _weighted_sum(side.loss.forward(side.score(contexts, sets.items), sets), weights)

        def losses(scores: Tensor, positions: Tensor) -> Tensor:
            return self._losses_of_all_items(
                side, contexts[positions], sets.rows(positions), scores
            )

        if self._scorer.kind == "product":
            return sum_over_blocks(*self._scorer.operands(contexts), losses, weights)

        def scored(positions: Tensor) -> Tensor:
            return losses(side.score_all(contexts[positions]), positions)

        # The full rows of one block of users at a time. For the gradient they are computed a second
        # time, so that this holds there too.
        positions = torch.arange(len(contexts), device=contexts.device)
        blocks = torch.split(positions, max(1, _SCORED_AT_A_TIME // side.teacher.n_items))
        found = (
            [scored(*blocks)]
            if len(blocks) == 1
            else [checkpoint(scored, b, use_reentrant=False) for b in blocks]
        )
        return _weighted_sum(torch.cat(found), weights)

    def _losses_of_all_items(
        self, side: _Side, contexts: Tensor, sets: ItemSets, scores: Tensor
    ) -> Tensor:
        if side.loss.teaches_all_items:
            sets = dataclasses.replace(sets, teacher_scores=side.teacher.score_all(contexts))
        if side.loss.masks_seen:
            sets = dataclasses.replace(sets, seen=side.seen.among(contexts))
        return side.loss.forward(scores, sets)

    # -- diagnostics -------------------------------------------------------------------------------

    def _diagnostics(self) -> dict[str, float]:
        """Overlap and NDCG with the teacher, closure gap, and what the loss reports.

        The keys are those of the loss's :meth:`~recbole_rcekd.losses.base.KDLoss.metrics`,
        ``gamma`` (the mean over all users, RCE-KD), those of
        :meth:`~recbole_rcekd.training.diagnostics.DiagnosticUsers.distance` and those of
        :func:`~recbole_rcekd.training.diagnostics.closure_metrics`.
        """
        side, users = self._sides[0], self._diagnostic_users
        found = side.loss.metrics()
        if side.sets is not None and side.sets.gamma is not None:
            found["gamma"] = float(side.sets.gamma.mean())
        if len(users) == 0:
            return found
        rows = side.score_all(users.contexts)
        found |= users.distance(rows)
        if side.sets is not None:
            found |= closure_metrics(side.loss, side.sets.rows(users.places), rows)
        return found


def _weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.sum() if weights is None else (losses * weights).sum()
