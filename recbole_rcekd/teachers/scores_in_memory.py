"""A teacher that is a table of scores in memory, in the student's ids."""

from __future__ import annotations

import uuid
from typing import Any

from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.base import Teacher


class ScoresInMemory(Teacher):
    """Scores that a pipeline of your own computed.

    Args:
        scores: of users, or of the rows of a sequential student: whichever they are as many as.
        student_dataset: the student's training dataset.
    """

    def __init__(self, scores: TeacherScores, student_dataset: Any) -> None:
        super().__init__(student_dataset, "the teacher")
        self._scores = scores
        self.scores_rows = self.for_rows and scores.n_contexts == len(student_dataset)
        # What cannot be told apart is never taken for something that was kept before.
        self._fingerprint = uuid.uuid4().hex

    @property
    def fingerprint(self) -> str:
        """Another one each time."""
        return self._fingerprint

    def score_all(self, contexts: Tensor) -> Tensor:
        """As the scores say."""
        return self._scores.score_all(contexts)

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """The scores as they are; nothing is kept on disk."""
        return self._scores
