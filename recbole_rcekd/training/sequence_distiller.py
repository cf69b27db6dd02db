"""Distillation of a sequential student: what is scored is a row of the training batch, a sequence and its target.

There is no table of users whose lists could be kept: a row stands in one batch of an epoch, and its
lists are made there, from the scores that the base loss needs anyway. Each row learns once per
epoch.
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
from recbole_rcekd.data.sequence_dataset import training_pairs
from recbole_rcekd.losses.base import TUNED_ON, KDLoss
from recbole_rcekd.models.batch_scores import BatchScores
from recbole_rcekd.models.product_recorder import Product
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.training.diagnostics import OVERLAP_AT, closure_metrics, distance_to_teacher
from recbole_rcekd.training.distiller import Distiller
from recbole_rcekd.training.sequence_candidates import RowTeacher, SequenceCandidates


def require_one_side(loss: KDLoss, scorer: ModelScorer) -> None:
    """Refuse a method that teaches items their users to a student without users.

    Args:
        loss: the method.
        scorer: the student.

    Raises:
        SettingsError: names the key.
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
        teaching: the teacher's scores of its rows, or of their users.
        loss: which method.
        settings: diagnostics. (``kd_schedule`` and ``kd_refresh_epochs`` speak of users; a row
            learns when it stands in a batch, from new lists.)
        dataset: the training set; its rows carry their numbers in the column ``kd_row`` while
            training lasts.
        seed: of all draws; they use a generator of their own, so RecBole's random stream is
            untouched.
        ranks: this process among those that train the student.
        trajectories: earlier states of each teacher, for losses that use them (the teacher itself
            is the last of each).

    Raises:
        SettingsError: the loss teaches the item side (IR-RRD), which takes users that can be
            scored.
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
        """Begin to count anew; candidates are chosen in the steps."""
        self._epoch = epoch
        self._untuned = self.loss.tuned
        self._sums.clear()

    def _kd_loss(self, batch: Interaction, products: Sequence[Product]) -> Tensor:
        """The mean over the batch's rows, each of which counts once."""
        rows = batch[ROW_FIELD]
        distinct, first = _first_places(rows)
        if len(distinct) < len(
            rows
        ):  # positives and negatives of one row, for models that learn from labels
            rows, batch = distinct, batch[first]
        student = self._scorer.score_batch(batch, list(products))
        with torch.no_grad():
            lists = self._lists(batch, rows, student)
            if self._untuned:
                self.loss.tune(lists.part(lists.contexts[:TUNED_ON]))
                self._untuned = False
            sets = self.loss.select(lists)
            if sets.gamma is not None:
                self._sums["gamma"] += float(sets.gamma.mean())
        return self._losses(student, sets, lists).mean()

    def _lists(self, batch: Interaction, rows: Tensor, student: BatchScores) -> SequenceCandidates:
        return SequenceCandidates(
            rows,
            self._teaching,
            batch,
            student.ranking(),
            self.generator,
            score=lambda places, items: student.part(places).score(items),
            score_all=lambda places: student.part(places).score_all().float(),
            popularity=self._popularity,
            trajectories=self._trajectories,
            epoch=self._epoch,
        )

    def _losses(self, student: BatchScores, sets: ItemSets, lists: SequenceCandidates) -> Tensor:
        if not self.loss.scores_all_items:
            return self.loss.forward(student.score(sets.items), sets)
        if self.loss.teaches_all_items:
            sets = dataclasses.replace(sets, teacher_scores=lists.teacher_scores_of_all())
        if self.loss.masks_seen:
            sets = dataclasses.replace(sets, seen=lists.seen())
        scores = student.score_all()
        # What is hidden is hidden from the teacher's opinion; a control has none to hide.
        return self.loss.forward(
            lists.mask_rows(scores) if self.loss.needs_teacher else scores, sets
        )

    def _diagnostics(self) -> dict[str, float]:
        """As of users (:class:`~recbole_rcekd.training.user_distiller.UserDistiller`), of rows."""
        found = self.loss.metrics()
        found |= {name: total / max(1, self.steps) for name, total in self._sums.items()}
        if len(self._diagnostic_rows) == 0:
            return found
        batch = self._rows.inputs(self._diagnostic_rows)
        student = self._scorer.score_batch(batch, [])
        scores = student.score_all().float()
        lists = self._lists(batch, self._diagnostic_rows, student)
        scores = lists.mask_rows(scores)
        k = min(OVERLAP_AT, self._teaching.n_items - 1)
        found |= distance_to_teacher(scores, lists.teacher_top(k))
        found |= closure_metrics(self.loss, self.loss.select(lists), scores)
        return found

    def _choose_diagnostic_rows(self) -> Tensor:
        n = min(-(-self.settings.kd_diagnostic_users // self._ranks.world), self._rows.n)
        return torch.randperm(self._rows.n, generator=self.generator, device=self.generator.device)[
            :n
        ]


def _first_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, and where each stands first."""
    distinct, place = torch.unique(rows, return_inverse=True)
    first = torch.full_like(distinct, len(rows))
    first.scatter_reduce_(0, place, torch.arange(len(rows), device=rows.device), "amin")
    return distinct, first
