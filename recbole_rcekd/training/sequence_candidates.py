"""The lists that rows of a sequential batch are taught on.

Two kinds of teachers say different things of a row:

* A **sequential** teacher scored the row's own sequence. Its lists are taken as they are.
* A **general** teacher scored the row's *user*, once, from all of the user's training items: its
  scores are those of the row's history, the target, and what the user took *later*. Taught as they
  are, a row would learn to look into the future, and to recommend what was just taken. So the
  user's other training items are *hidden* from the row, in the teacher's lists and in the
  student's; only the target stays among them.
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
from recbole_rcekd.data.sequence_dataset import training_pairs
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class RowTeacher:
    """What a teacher says to rows.

    Args:
        scores: of rows, or of users.
        n_items: padding included.
        item_field: column of a row's target.
        list_field: column of its sequence.
        users: for each row its user, if the scores are of users.
        taken: the training items of each user, likewise.
    """

    scores: TeacherScores
    n_items: int
    item_field: str
    list_field: str
    users: Tensor | None = None
    taken: Seen | None = None

    def to(self, device: torch.device) -> RowTeacher:
        """The same where the student is."""
        users = None if self.users is None else self.users.to(device)
        return replace(
            self, users=users, taken=None if self.taken is None else self.taken.to(device)
        )


def row_teacher_of(dataset: Any, scores: TeacherScores, by_rows: bool | None = None) -> RowTeacher:
    """How scores speak to the rows of a sequential training set.

    Args:
        dataset: the training set.
        scores: of its rows, or of its users.
        by_rows: which; default: of rows if there are as many, else of users.

    Raises:
        TeacherError: they are of neither.
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
    """The lists of one batch; contexts are places in it, 0 to B − 1.

    Args:
        rows: numbers of the rows in the training set, ``[B]``.
        teaching: what the teacher says of them.
        batch: the rows.
        student: ranks of the places.
        generator: the source of all draws.
        more: further arguments of :class:`~recbole_rcekd.losses.candidates.Candidates`.

    Attributes:
        ids: numbers of the rows.
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
        places = torch.arange(len(rows), device=rows.device)
        super().__init__(places, teaching.scores, student, None, generator, **more)
        self.ids = rows
        self._teaching = teaching
        self._batch = batch
        self._targets = batch[teaching.item_field].long()
        self._asked_of_batch = rows if teaching.users is None else teaching.users[rows]

    @property
    def _asked(self) -> Tensor:
        """Whom the teacher is asked about."""
        return self._asked_of_batch[self.contexts]

    @cached_property
    def _seen(self) -> Seen:  # type: ignore[override]
        """The row's sequence and target, or all that its user took."""
        if self._teaching.taken is not None:
            return self._local(*self._teaching.taken.cells(self._asked_of_batch))
        listed = torch.cat(
            [self._batch[self._teaching.list_field].long(), self._targets.unsqueeze(1)], dim=1
        )
        places, columns = listed.nonzero(as_tuple=True)
        return self._local(places, listed[places, columns])

    @cached_property
    def _masked(self) -> Seen | None:
        """What the row must not hear of: its user's training items but the target."""
        if self._teaching.taken is None:
            return None
        places, ids = self._teaching.taken.cells(self._asked_of_batch)
        others = ids != self._targets[places]
        return self._local(places[others], ids[others])

    def seen(self) -> Seen:
        """What the places of the batch have: see :attr:`ItemSets.seen <recbole_rcekd.core.types.ItemSets>`."""
        return self._seen

    def _local(self, places: Tensor, ids: Tensor) -> Seen:
        return Seen.from_pairs(places, ids, len(self._targets), self._teaching.n_items)

    def student_top(self, k: int, unseen: bool = False) -> Tensor:
        """The student's best ``k`` items, best first, ``[n, k]``; without hidden ones."""
        return self._student.top_k(self.contexts, k, self._seen if unseen else self._masked)

    def teacher_top(self, k: int, unseen: bool = False) -> Tensor:
        """The teacher's best ``k`` items, best first, ``[n, k]``; without hidden ones."""
        scores = self._teacher
        if self._masked is None:
            if not unseen:
                return scores.top_k(self._asked, k, unseen=False)
            by_place = RowRanking(
                lambda places: scores.score_all(self._asked_of_batch[places]), self.n_items
            )
            return by_place.top_k(self.contexts, k, self._seen)
        lists = scores.top_k(self._asked, k, unseen=True)
        return lists if unseen else self._with_target(lists)

    def teacher_scores(self, items: Tensor) -> Tensor:
        """The teacher's scores of ``items [n, T]``."""
        return self._teacher.score(self._asked, items)

    def teacher_scores_of_all(self) -> Tensor:
        """The teacher's scores of every item, ``[n, n_items]``; −inf at the padding item and the hidden ones."""
        return self.mask_rows(self._teacher.score_all(self._asked))

    def student_scores_of_all(self) -> Tensor:
        """The student's scores of every item, ``[n, n_items]``; −inf at the padding item and the hidden ones."""
        return self.mask_rows(super().student_scores_of_all())

    def n_allowed(self) -> Tensor:
        """How many items there are for each row, ``[n]``: the catalogue, without padding and hidden ones."""
        whole = super().n_allowed()
        return whole if self._masked is None else whole - self._masked.counts()[self.contexts]

    def draw(self, n: int, outside: Tensor) -> Tensor:
        """``n`` distinct items per row, uniform over what is neither hidden nor in ``outside``; 0 where there are fewer."""
        return self._draw(n, outside, self._masked)

    def positives(self, n: int) -> Tensor:
        """The target, ``[n_contexts, n]``; 0 after it."""
        return torch.nn.functional.pad(self._targets[self.contexts].unsqueeze(1), (0, n - 1))

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Full rows of scores with −inf at the hidden items."""
        if self._masked is None:
            return rows
        rows = rows.clone()
        rows[self._masked.cells(self.contexts)] = -torch.inf
        return rows

    def _with_target(self, lists: Tensor) -> Tensor:
        """Put the target where its score belongs; nowhere if the teacher says nothing of the user."""
        items = torch.cat([self._targets[self.contexts].unsqueeze(1), lists], dim=1)
        scores = self.teacher_scores(items).masked_fill(items == 0, -torch.inf)
        items = items.masked_fill(scores == -torch.inf, 0)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : lists.shape[1]]
        return items.gather(1, order)
