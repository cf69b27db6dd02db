"""RecBole's metrics of a teacher on the student's data, and the time that ranking takes."""

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
from recbole_rcekd.teachers.score_tables import blocks

# If a teacher's scores of some items are needed, full rows are computed for so many users or
# sequences at a time.
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
        teacher: the teacher.
        config: the student's Config.
        train_data: the loader of the student's training data.
        valid_data: the loader of the student's validation data.
        test_data: the loader of the student's test data.
        course: the epochs and seconds of the teacher's training, if the command trained it.
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
    """An object with scores for rows; usually a teacher."""

    def score_rows(self, rows: Any) -> torch.Tensor:
        """See :meth:`Teacher.score_rows <recbole_rcekd.teachers.base.Teacher.score_rows>`."""
        ...


class TeacherAsModel(torch.nn.Module):
    """A teacher as a RecBole model, with the methods that RecBole's evaluation calls.

    Args:
        teacher: the teacher.
        config: the student's Config.
    """

    def __init__(self, teacher: ScoresRows, config: Any) -> None:
        super().__init__()
        self.device = config["device"]
        self._teacher = teacher
        self._user, self._item = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self._sequence = f"{self._item}{config['LIST_SUFFIX']}"
        # The trainer's optimizer needs a parameter.
        self.unused = torch.nn.Parameter(torch.zeros(1, device=self.device))

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        """The scores of all items; RecBole calls this if it evaluates with all items."""
        return self._teacher.score_rows(interaction)

    def predict(self, interaction: Any) -> torch.Tensor:
        """The scores ``[n]`` of the items in n rows.

        RecBole calls this if it evaluates with sampled or labelled items. A user (or sequence) in
        several rows is scored once.
        """
        asked = interaction[self._user].unsqueeze(1)
        if self._sequence in interaction.columns:
            asked = torch.cat([asked, interaction[self._sequence]], dim=1)
        distinct, index = torch.unique(asked, dim=0, return_inverse=True)
        rows = torch.arange(len(index), device=index.device)
        first = index.new_zeros(len(distinct)).scatter_(0, index, rows)
        order = index.argsort()
        counts = torch.bincount(index)
        found = torch.empty(len(index), device=self.device)
        ends = torch.split(counts, _PREDICTED_AT_A_TIME)
        for some, own in zip(
            torch.split(first, _PREDICTED_AT_A_TIME),
            torch.split(order, [int(c.sum()) for c in ends]),
            strict=True,
        ):
            scores = self._teacher.score_rows(interaction[some]).to(self.device)
            found[own] = scores[index[own] - index[own[0]], interaction[self._item][own]]
        return found


def evaluated(trainer: Any, data: Any) -> dict[str, float]:
    """RecBole's metrics on rows without the transformation of the student's model.

    That transformation is not the teacher's.

    Args:
        trainer: a trainer with the model that is measured.
        data: the loader of validation or test data.
    """
    transform, data.transform = data.transform, lambda dataset, rows: rows
    try:
        return {k: float(v) for k, v in trainer.evaluate(data, load_best_model=False).items()}
    finally:
        data.transform = transform


def ranking_time(model: Any, dataset: Any) -> float:
    """Milliseconds to score and rank all items for 1,000 users (or sequences); median of three.

    Args:
        model: a RecBole model; it is in evaluation mode meanwhile.
        dataset: the dataset it was built for.
    """
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
