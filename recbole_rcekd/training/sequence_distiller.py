"""Distillation of a sequential student, which learns rows: a sequence and its target each.

A row is in one batch of an epoch. Its candidates are chosen there, from scores that the base loss
needs too. So each row learns once per epoch, and no candidates are kept between steps.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import ItemSets, TeacherScores
from recbole_rcekd.data.contexts import ROW_FIELD, Rows
from recbole_rcekd.data.sequences import training_pairs
from recbole_rcekd.losses.base import TUNED_ON, KDLoss
from recbole_rcekd.models.batch_scores import BatchScores
from recbole_rcekd.models.product_recorder import Product
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.training.diagnostics import OVERLAP_AT, closure_metrics, distance_to_teacher
from recbole_rcekd.training.distiller import Distiller
from recbole_rcekd.training.sequence_candidates import RowTeacher, SequenceCandidates


def require_one_side(loss: KDLoss, scorer: ModelScorer) -> None:
    """Refuse a method with a loss over users for each item, if the student does not score users.

    Args:
        loss: the method.
        scorer: the student.

    Raises:
        SettingsError: the method has such a loss; the message names the key that turns it off.
    """
    if loss.item_side() is not None and not scorer.scores_users:
        prefix = loss.prefix()
        raise SettingsError(
            f"[{prefix}_item_weight] teaches which users an item should go to, but {scorer.name} "
            "scores sequences, not users: set it to 0."
        )


class SequenceDistiller(Distiller):
    """The KD term of one training run of a sequential student.

    Args:
        scorer: the student.
        teaching: the teacher's scores for the rows, or for their users.
        loss: the method.
        settings: ``kd_diagnostic_users`` is used. (``kd_schedule`` and ``kd_refresh_epochs`` are
            for users. A row learns when it is in a batch, from new candidates.)
        dataset: the training set. In training, its batches have the ids of the rows in the column
            ``kd_row``.
        seed: the seed of all random draws. They come from a generator of their own, so RecBole's
            random stream stays the same.
        ranks: this process among those that train the student.
        trajectories: the states of each teacher, for losses that use them; the teacher itself is
            the last.

    Raises:
        SettingsError: the method has a loss over users for each item (IR-RRD); or it needs more
            items than the catalogue has.
    """

    loss: KDLoss
    needs_rows = True

    def __init__(
        self,
        scorer: ModelScorer,
        teaching: RowTeacher,
        loss: KDLoss,
        settings: KDSettings,
        dataset: Any,
        seed: int,
        ranks: Ranks | None = None,
        trajectories: Sequence[Sequence[TeacherScores]] = (),
    ) -> None:
        loss.settings.check_catalogue(teaching.n_items - 1)
        require_one_side(loss, scorer)
        super().__init__(loss, scorer, seed, ranks)
        self.settings = settings
        self._teaching = teaching.to(scorer.device)
        self._rows = Rows(dataset)
        items = training_pairs(dataset)[1]
        self._popularity = torch.bincount(items, minlength=teaching.n_items).to(scorer.device)
        self._trajectories = trajectories
        self._epoch = 0
        self._untuned = loss.tuned
        loss.prepare(self._rows.n, scorer.device)
        self._diagnostic_rows = self._choose_diagnostic_rows()
        self._sums: dict[str, float] = defaultdict(float)

    def _prepare(self, epoch: int, n_steps: int) -> None:
        """Reset the sums of the epoch; candidates are chosen in the steps."""
        self._epoch = epoch
        self._untuned = self.loss.tuned
        self._sums.clear()

    def _kd_loss(self, batch: Interaction, products: Sequence[Product]) -> Tensor:
        """The mean of the losses of the batch's rows; each row counts once."""
        rows = batch[ROW_FIELD]
        distinct, first = _first_places(rows)
        # A model that learns from labels has a row twice: with a positive and a negative item.
        if len(distinct) < len(rows):
            rows, batch = distinct, batch[first]
        student = self._scorer.score_batch(batch, list(products))
        with torch.no_grad():
            candidates = self._lists(batch, rows, student)
            if self._untuned:
                self.loss.tune(candidates.part(candidates.contexts[:TUNED_ON]))
                self._untuned = False
            sets = self.loss.select(candidates)
            if sets.gamma is not None:
                self._sums["gamma"] += float(sets.gamma.mean())
        return self._losses(student, sets, candidates).mean()

    def _lists(self, batch: Interaction, rows: Tensor, student: BatchScores) -> SequenceCandidates:
        return SequenceCandidates(
            rows,
            self._teaching,
            batch,
            student.ranking(),
            self.generator,
            score=lambda positions, items: student.part(positions).score(items),
            score_all=lambda positions: student.part(positions).score_all().float(),
            popularity=self._popularity,
            trajectories=self._trajectories,
            epoch=self._epoch,
        )

    def _losses(
        self, student: BatchScores, sets: ItemSets, candidates: SequenceCandidates
    ) -> Tensor:
        if not self.loss.scores_all_items:
            return self.loss.forward(student.score(sets.items), sets)
        if self.loss.teaches_all_items:
            sets = dataclasses.replace(sets, teacher_scores=candidates.teacher_scores_of_all())
        if self.loss.masks_seen:
            sets = dataclasses.replace(sets, seen=candidates.seen())
        scores = student.score_all()
        # Items are masked because of the teacher's scores, so not for a control, which has none.
        return self.loss.forward(
            candidates.mask_rows(scores) if self.loss.needs_teacher else scores, sets
        )

    def _diagnostics(self) -> dict[str, float]:
        """The diagnostics of :class:`~recbole_rcekd.training.user_distiller.UserDistiller`."""
        found = self.loss.metrics()
        found |= {name: total / max(1, self.steps) for name, total in self._sums.items()}
        if len(self._diagnostic_rows) == 0:
            return found
        batch = self._rows.inputs(self._diagnostic_rows)
        student = self._scorer.score_batch(batch, [])
        scores = student.score_all().float()
        candidates = self._lists(batch, self._diagnostic_rows, student)
        scores = candidates.mask_rows(scores)
        k = min(OVERLAP_AT, self._teaching.n_items - 1)
        found |= distance_to_teacher(scores, candidates.teacher_top(k))
        found |= closure_metrics(self.loss, self.loss.select(candidates), scores)
        return found

    def _choose_diagnostic_rows(self) -> Tensor:
        n = min(-(-self.settings.kd_diagnostic_users // self._ranks.world), self._rows.n)
        return torch.randperm(self._rows.n, generator=self.generator, device=self.generator.device)[
            :n
        ]


def _first_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, and the first position of each."""
    distinct, index = torch.unique(rows, return_inverse=True)
    first = torch.full_like(distinct, len(rows))
    first.scatter_reduce_(0, index, torch.arange(len(rows), device=rows.device), "amin")
    return distinct, first
