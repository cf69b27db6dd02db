"""A teacher made of scores in memory, in the student's ids."""

from __future__ import annotations

import uuid
from typing import Any

from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.base import Teacher


class ScoresInMemory(Teacher):
    """A teacher made of scores that a pipeline of your own computed.

    Args:
        scores: the scores for users, or for the rows of a sequential student. They are for rows if
            there are as many as rows.
        student_dataset: the student's training dataset.
    """

    def __init__(self, scores: TeacherScores, student_dataset: Any) -> None:
        super().__init__(student_dataset, "the teacher")
        self._scores = scores
        self.scores_rows = self.for_rows and scores.n_contexts == len(student_dataset)
        # Scores in memory cannot be recognised in a later run, so the fingerprint is always new.
        self._fingerprint = uuid.uuid4().hex

    @property
    def fingerprint(self) -> str:
        """A random text, a new one for each object."""
        return self._fingerprint

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        return self._scores.score_all(contexts)

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """The scores that were given; nothing is kept on disk."""
        return self._scores
