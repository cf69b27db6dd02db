"""A teacher made of scores in memory, in the student's ids."""

from __future__ import annotations

import uuid
from typing import Any

from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.base import Teacher

# What scores must have; all else of TeacherScores has a default.
SCORE_METHODS = ("score", "score_all", "top_k", "transposed")


class OtherScores(TeacherScores):
    """Scores of a class that is no :class:`TeacherScores`, but has its required members.

    Args:
        scores: an object with ``n_contexts``, ``n_items`` and :data:`SCORE_METHODS`.
    """

    def __init__(self, scores: Any) -> None:
        self._scores = scores
        self.n_contexts, self.n_items = scores.n_contexts, scores.n_items
        self.partial = bool(getattr(scores, "partial", False))

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        found: Tensor = self._scores.score(contexts, items)
        return found

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        found: Tensor = self._scores.score_all(contexts)
        return found

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        found: Tensor = self._scores.top_k(contexts, k, unseen)
        return found

    def transposed(self) -> OtherScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return OtherScores(self._scores.transposed())


class ScoresInMemory(Teacher):
    """A teacher made of scores that a pipeline of your own computed.

    Args:
        scores: the scores for users, or for the rows of a sequential student. They are for rows if
            there are as many as rows.
        student_dataset: the student's training dataset.
    """

    def __init__(self, scores: TeacherScores, student_dataset: Any) -> None:
        super().__init__(student_dataset, "the teacher")
        known = isinstance(scores, TeacherScores)
        self._scores = scores if known else OtherScores(scores)
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
