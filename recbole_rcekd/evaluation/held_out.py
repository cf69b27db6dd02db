"""One model on the test set: RecBole's metrics, and the NDCG and top items of each user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from recbole.evaluator.register import metrics_dict
from recbole.trainer import Trainer
from torch import Tensor

from recbole_rcekd.compat import without_tensorboard
from recbole_rcekd.core.functional import is_member
from recbole_rcekd.evaluation.evaluate import TeacherAsModel, evaluated
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.training.diagnostics import NDCG_AT


@dataclass(frozen=True)
class HeldOutResult:
    """The evaluation of one model on the test set.

    Attributes:
        result: RecBole's metrics.
        users: the user of each test list, ``[n]``.
        ndcg: NDCG@10 of each test list, ``[n]``.
        lists: the top-10 of each test list, ``[n, 10]``.
    """

    result: dict[str, float]
    users: Tensor
    ndcg: Tensor
    lists: Tensor


class _UserRecorder:
    """A teacher that keeps the users of the rows that it scored."""

    def __init__(self, model: Teacher, user_field: str) -> None:
        self.users: list[Tensor] = []
        self._model, self._user_field = model, user_field

    def score_rows(self, rows: Any) -> Tensor:
        self.users.append(rows[self._user_field].cpu())
        return self._model.score_rows(rows)


class _RecordingEvaluator:
    """RecBole's evaluator, which also keeps the data that it evaluated."""

    collected: Any = None

    def __init__(self, evaluator: Any) -> None:
        self._evaluator = evaluator

    def evaluate(self, collected: Any) -> Any:
        self.collected = collected
        return self._evaluator.evaluate(collected)


def shared_with_teacher(tested: Mapping[str, HeldOutResult], name: str) -> Tensor:
    """The share of the teacher's top-10 that is in the model's top-10, for each test list."""
    return is_member(tested["teacher"].lists, tested[name].lists).double().mean(1)


def held_out_result(model: Teacher, config: Any, train: Any, test: Any) -> HeldOutResult:
    """Evaluate one model on the test set, with RecBole's evaluation and its own NDCG of each user.

    Args:
        model: a teacher, or a student that is asked as one.
        config: the student's Config, with the metrics.
        train: the student's training data, for metrics that count them.
        test: the student's test data.
    """
    noting = _UserRecorder(model, train._dataset.uid_field)
    with without_tensorboard():
        trainer = Trainer(config, TeacherAsModel(noting, config))
    trainer.eval_collector.data_collect(train)
    evaluator = trainer.evaluator = _RecordingEvaluator(trainer.evaluator)
    result = evaluated(trainer, test)
    ndcg = metrics_dict["ndcg"](config)
    each = ndcg.metric_info(*ndcg.used_info(evaluator.collected))[:, NDCG_AT - 1]
    lists = evaluator.collected.get("rec.items")[:, :NDCG_AT]
    return HeldOutResult(result, torch.cat(noting.users), torch.from_numpy(each), lists)
