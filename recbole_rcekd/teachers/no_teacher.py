"""A teacher without scores, for methods that learn without a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.base import Teacher


class NoScores(TeacherScores):
    """The scores of a teacher that covers no user: −inf for all items, and empty top-K lists.

    Args:
        n_contexts: how many users (or rows of sequences) there are, padding included.
        n_items: how many items there are, padding included.
        device: the device of the student.
    """

    partial = True

    def __init__(self, n_contexts: int, n_items: int, device: torch.device) -> None:
        self.n_contexts, self.n_items = n_contexts, n_items
        self._device = device

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return torch.full(items.shape, -torch.inf, device=self._device)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return torch.full((len(contexts), self.n_items), -torch.inf, device=self._device)

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return torch.zeros((len(contexts), k), dtype=torch.int64, device=self._device)

    def transposed(self) -> NoScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return NoScores(self.n_items, self.n_contexts, self._device)


class NoTeacher(Teacher):
    """A teacher that covers no user.

    Args:
        student_dataset: the student's training dataset.
    """

    fingerprint = ""
    scores_users = False

    def __init__(self, student_dataset: Any) -> None:
        super().__init__(student_dataset, "no teacher")
        self.scores_rows = self.for_rows

    def score_all(self, contexts: Tensor) -> Tensor:
        """−inf for all items."""
        return self.open_scores(KDSettings()).score_all(contexts)

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """:class:`NoScores`; nothing is kept on disk."""
        return NoScores(self.n_contexts, self.n_items, self.device)
