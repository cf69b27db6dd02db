"""Teacher and students measured alike: RecBole's metrics of a teacher in the student's ids, and the time that ranking takes."""

from __future__ import annotations

import os
import statistics
from time import perf_counter
from typing import Any, Protocol

import torch
from recbole.trainer import Trainer

from recbole_rcekd.compat import without_tensorboard
from recbole_rcekd.evaluation.report import TeacherResult
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.score_cache import blocks

# Of a teacher that is asked for some items only, full rows of so many users or sequences are made
# together.
_PREDICTED_AT_A_TIME = 64


def measure_teacher(
    teacher: Teacher,
    config: Any,
    train_data: Any,
    valid_data: Any,
    test_data: Any,
    course: dict[str, Any],
) -> TeacherResult:
    """Measure a teacher with RecBole's evaluation on the student's data.

    Args:
        teacher: who.
        config: the student's.
        train_data: the student's.
        valid_data: likewise.
        test_data: likewise.
        course: of the teacher's training, if it was trained here (epochs, seconds).
    """
    scorers = teacher.scorers()
    with without_tensorboard():
        trainer = Trainer(config, TeacherAsModel(teacher, config))
    trainer.eval_collector.data_collect(train_data)  # for metrics of popularity and coverage
    valid, test = (evaluated(trainer, data) for data in (valid_data, test_data))
    return TeacherResult(
        model=teacher.name,
        checkpoint=teacher.source,
        fingerprint=teacher.fingerprint,
        best_valid_result=valid,
        test_result=test,
        parameters=sum(p.numel() for scorer in scorers for p in scorer.model.parameters()),
        checkpoint_bytes=sum(map(os.path.getsize, filter(os.path.exists, teacher.files()))),
        ranking_ms_per_1000_users=round(sum(_time_ranking(scorer) for scorer in scorers), 2),
        **course,
    )


class ScoresRows(Protocol):
    """Whatever can be asked for scores of rows: a teacher, as a rule."""

    def score_rows(self, rows: Any) -> torch.Tensor:
        """See :meth:`Teacher.score_rows <recbole_rcekd.teachers.base.Teacher.score_rows>`."""
        ...


class TeacherAsModel(torch.nn.Module):
    """The teacher in the student's ids, as much of a RecBole model as evaluation needs."""

    def __init__(self, teacher: ScoresRows, config: Any) -> None:
        super().__init__()
        self.device = config["device"]
        self._teacher = teacher
        self._user, self._item = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self._sequence = f"{self._item}{config['LIST_SUFFIX']}"
        self.unused = torch.nn.Parameter(
            torch.zeros(1, device=self.device)
        )  # the trainer builds an optimiser

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        """Called by RecBole's evaluation of all items."""
        return self._teacher.score_rows(interaction)

    def predict(self, interaction: Any) -> torch.Tensor:
        """Called by RecBole's evaluation of sampled or labelled items, ``[n]``; whoever stands in many rows is scored once."""
        asked = interaction[self._user].unsqueeze(1)
        if self._sequence in interaction.columns:
            asked = torch.cat([asked, interaction[self._sequence]], dim=1)
        distinct, place = torch.unique(asked, dim=0, return_inverse=True)
        rows = torch.arange(len(place), device=place.device)
        first = place.new_zeros(len(distinct)).scatter_(0, place, rows)
        order = place.argsort()
        counts = torch.bincount(place)
        found = torch.empty(len(place), device=self.device)
        ends = torch.split(counts, _PREDICTED_AT_A_TIME)
        for some, own in zip(
            torch.split(first, _PREDICTED_AT_A_TIME),
            torch.split(order, [int(c.sum()) for c in ends]),
            strict=True,
        ):
            scores = self._teacher.score_rows(interaction[some]).to(self.device)
            found[own] = scores[place[own] - place[own[0]], interaction[self._item][own]]
        return found


def evaluated(trainer: Any, data: Any) -> dict[str, float]:
    """RecBole's metrics on rows as they are: the transformation that the student's model wants is not the teacher's."""
    transform, data.transform = data.transform, lambda dataset, rows: rows
    try:
        return {k: float(v) for k, v in trainer.evaluate(data, load_best_model=False).items()}
    finally:
        data.transform = transform


def ranking_time(model: Any, dataset: Any) -> float:
    """Milliseconds to score and rank the whole catalogue for 1,000 users (or sequences), in evaluation mode; median of
    three.
    """  # noqa: D205
    return _time_ranking(ModelScorer(model, dataset))


def _time_ranking(scorer: ModelScorer) -> float:
    times = []
    for _ in range(3):
        started, done = perf_counter(), 0
        with scorer.evaluating():
            for users in blocks(min(1001, scorer.n_contexts), scorer.n_items):
                rows = scorer.score_all(users[users > 0].to(scorer.device))
                rows.topk(min(10, scorer.n_items - 1), dim=1)
                done += len(rows)
        if scorer.device.type == "cuda":
            torch.cuda.synchronize(scorer.device)
        times.append((perf_counter() - started) * 1e6 / done)
    return round(statistics.median(times), 2)
