"""The candidates of the rows of a sequential student's batch.

There are two kinds of teachers:

* A **sequential** teacher scores the row's own sequence. Its top-K lists are used as they are.
* A **general** teacher scores the row's *user*, from all of the user's training items: the row's
  history, its target, and the items that come *later*. From such scores a row would learn the
  future, and to recommend items that the user has just had. So the user's training items are
  *masked* for the row, except the target, in the teacher's and in the student's candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.top_k import Ranking, RowRanking
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.data.sequences import training_pairs
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class RowTeacher:
    """The teacher's scores for the rows of a sequential training set.

    Args:
        scores: the scores for rows, or for users.
        n_items: how many items there are, padding included.
        item_field: the column of a row's target.
        list_field: the column of a row's sequence.
        users: the user of each row, if the scores are for users.
        taken: the training items of each user, if the scores are for users.
    """

    scores: TeacherScores
    n_items: int
    item_field: str
    list_field: str
    users: Tensor | None = None
    taken: Seen | None = None

    def to(self, device: torch.device) -> RowTeacher:
        """The same on another device; the scores stay where they are."""
        users = None if self.users is None else self.users.to(device)
        return replace(
            self, users=users, taken=None if self.taken is None else self.taken.to(device)
        )


def row_teacher_of(dataset: Any, scores: TeacherScores, by_rows: bool | None = None) -> RowTeacher:
    """The teacher of the rows of a sequential training set.

    Args:
        dataset: the training set.
        scores: the teacher's scores for its rows, or for its users.
        by_rows: the scores are for rows; default: they are if there are as many as rows.

    Raises:
        TeacherError: there are neither as many scores as rows nor as many as users.
    """
    n_rows, n_users = len(dataset), int(dataset.user_num)
    if scores.n_contexts not in (n_rows, n_users):
        raise TeacherError(
            f"The teacher scores {scores.n_contexts} contexts, but the training data have {n_rows} "
            f"rows and {n_users} users (padding included): give it one of these."
        )
    n_items, item = int(dataset.item_num), dataset.iid_field
    fields = (n_items, item, item + dataset.config["LIST_SUFFIX"])
    if scores.n_contexts == n_rows if by_rows is None else by_rows:
        return RowTeacher(scores, *fields)
    taken = Seen.from_pairs(*training_pairs(dataset), n_users, n_items)
    return RowTeacher(scores, *fields, dataset.inter_feat[dataset.uid_field], taken)


class SequenceCandidates(Candidates):
    """The candidates of the rows of one batch; a row is given by its position, 0 to B − 1.

    Args:
        rows: the ids of the rows in the training set, ``[B]``.
        teaching: the teacher's scores for rows.
        batch: the rows, as RecBole's loader gave them.
        student: the student's ranking, by positions in the batch.
        generator: the source of all random draws.
        more: further arguments of :class:`~recbole_rcekd.losses.candidates.Candidates`.

    Attributes:
        ids: the ids of the rows in the training set.
    """

    def __init__(
        self,
        rows: Tensor,
        teaching: RowTeacher,
        batch: Interaction,
        student: Ranking,
        generator: torch.Generator,
        **more: Any,
    ) -> None:
        positions = torch.arange(len(rows), device=rows.device)
        super().__init__(positions, teaching.scores, student, None, generator, **more)
        self.ids = rows
        self._teaching = teaching
        self._batch = batch
        self._targets = batch[teaching.item_field].long()
        self._asked_of_batch = rows if teaching.users is None else teaching.users[rows]

    @property
    def _asked(self) -> Tensor:
        """The ids by which the teacher scores the rows: of rows, or of their users."""
        return self._asked_of_batch[self.contexts]

    @cached_property
    def _seen(self) -> Seen:  # type: ignore[override]
        """The items of the row's sequence and its target, or all training items of its user."""
        if self._teaching.taken is not None:
            return self._local(*self._teaching.taken.cells(self._asked_of_batch))
        listed = torch.cat(
            [self._batch[self._teaching.list_field].long(), self._targets.unsqueeze(1)], dim=1
        )
        positions, columns = listed.nonzero(as_tuple=True)
        return self._local(positions, listed[positions, columns])

    @cached_property
    def _masked(self) -> Seen | None:
        """The masked items of each row: its user's training items, except the target."""
        if self._teaching.taken is None:
            return None
        positions, ids = self._teaching.taken.cells(self._asked_of_batch)
        others = ids != self._targets[positions]
        return self._local(positions[others], ids[others])

    def seen(self) -> Seen:
        """The items that each row has, by positions in the batch.

        See :attr:`ItemSets.seen <recbole_rcekd.core.types.ItemSets>`.
        """
        return self._seen

    def _local(self, positions: Tensor, ids: Tensor) -> Seen:
        return Seen.from_pairs(positions, ids, len(self._targets), self._teaching.n_items)

    def student_top(self, k: int, unseen: bool = False) -> Tensor:
        """The student's top-``k`` items, best first, ``[n, k]``, without masked items."""
        return self._student.top_k(self.contexts, k, self._seen if unseen else self._masked)

    def teacher_top(self, k: int, unseen: bool = False) -> Tensor:
        """The teacher's top-``k`` items, best first, ``[n, k]``, without masked items."""
        scores = self._teacher
        if self._masked is None:
            if not unseen:
                return scores.top_k(self._asked, k, unseen=False)
            ranking = RowRanking(
                lambda positions: scores.score_all(self._asked_of_batch[positions]), self.n_items
            )
            return ranking.top_k(self.contexts, k, self._seen)
        lists = scores.top_k(self._asked, k, unseen=True)
        return lists if unseen else self._with_target(lists)

    def teacher_scores(self, items: Tensor) -> Tensor:
        """The teacher's scores of ``items [n, T]``."""
        return self._teacher.score(self._asked, items)

    def teacher_scores_of_all(self) -> Tensor:
        """The teacher's scores of all items, ``[n, n_items]``.

        −inf at the padding item and at masked items.
        """
        return self.mask_rows(self._teacher.score_all(self._asked))

    def student_scores_of_all(self) -> Tensor:
        """The student's scores of all items, ``[n, n_items]``, without gradient.

        −inf at the padding item and at masked items.
        """
        return self.mask_rows(super().student_scores_of_all())

    def n_allowed(self) -> Tensor:
        """How many items each row may be given, ``[n]``: all but padding and masked ones."""
        whole = super().n_allowed()
        return whole if self._masked is None else whole - self._masked.counts()[self.contexts]

    def draw(self, n: int, outside: Tensor) -> Tensor:
        """Draw ``n`` distinct items per row that are neither masked nor in ``outside [n, P]``.

        They are drawn uniformly; 0 where there are fewer.
        """
        return self._draw(n, outside, self._masked)

    def positives(self, n: int) -> Tensor:
        """The target of each row, followed by zeros, ``[n_contexts, n]``."""
        return torch.nn.functional.pad(self._targets[self.contexts].unsqueeze(1), (0, n - 1))

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Full rows of scores with −inf at masked items."""
        if self._masked is None:
            return rows
        rows = rows.clone()
        rows[self._masked.cells(self.contexts)] = -torch.inf
        return rows

    def _with_target(self, lists: Tensor) -> Tensor:
        """Insert the target into lists by its score; not if the teacher does not cover the user."""
        items = torch.cat([self._targets[self.contexts].unsqueeze(1), lists], dim=1)
        scores = self.teacher_scores(items).masked_fill(items == 0, -torch.inf)
        items = items.masked_fill(scores == -torch.inf, 0)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : lists.shape[1]]
        return items.gather(1, order)
