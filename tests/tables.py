"""Small teachers and students as tables, without RecBole, for the tests of losses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recbole_rcekd.core.top_k import RowRanking, top_k
from recbole_rcekd.core.types import ItemSets, Seen, TeacherScores
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.teachers.score_tables import FactorScores


def seen_of(pairs: Iterable[tuple[int, int]], n_contexts: int, n_items: int) -> Seen:
    """The interactions (user, item) as :class:`Seen`."""
    table = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
    return Seen.from_pairs(table[:, 0], table[:, 1], n_contexts, n_items)


class Table(TeacherScores):
    """A teacher given by its full scores, in their precision (float64 for exact comparisons)."""

    def __init__(self, scores: Tensor, seen: Seen) -> None:
        self.scores = scores.clone()
        self.scores[:, 0] = -torch.inf
        self.seen = seen
        self.n_contexts, self.n_items = scores.shape

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        return self.scores[contexts].gather(1, items)

    def score_all(self, contexts: Tensor) -> Tensor:
        return self.scores[contexts]

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        rows = self.scores[contexts]
        if unseen:
            rows[self.seen.cells(contexts)] = -torch.inf
        return top_k(rows, min(k, self.n_items - 1))

    def transposed(self) -> Table:
        return Table(self.scores.t(), self.seen.transposed())


def ranking_of(scores: Tensor) -> RowRanking:
    """A ranking by a whole table of scores, ``[n_contexts, n_items]``."""
    return RowRanking(lambda contexts: scores[contexts], scores.shape[1])


class World(NamedTuple):
    """A teacher and a student with different scores, and the training interactions."""

    teacher: TeacherScores
    student: Tensor
    seen: Seen

    def lists(self, contexts: Tensor | None = None, seed: int = 0) -> Candidates:
        """The candidates of the users ``contexts`` (default: all except padding)."""
        if contexts is None:
            contexts = torch.arange(1, self.teacher.n_contexts)
        return Candidates(
            contexts,
            self.teacher,
            ranking_of(self.student),
            self.seen,
            torch.Generator().manual_seed(seed),
            score=lambda asked, items: self.student[asked].gather(1, items),
            score_all=lambda asked: self.student[asked].clone(),
            popularity=torch.bincount(self.seen.ids, minlength=self.seen.n_ids),
            trajectories=[[*self.earlier, self.teacher]],
        )

    @property
    def earlier(self) -> list[TeacherScores]:
        """Two earlier states of the teacher; the later one is more like it."""
        full = self.teacher.score_all(torch.arange(self.teacher.n_contexts))
        noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(9))
        listed = full != -torch.inf
        return [Table(full.where(~listed, full + times * noise), self.seen) for times in (2.0, 0.5)]

    def user(self, user: int, items: list[int]) -> User:
        """One user as plain lists, with the columns selected for that user."""
        seen = self.seen.cells(torch.tensor([user]))[1].tolist()
        teacher = self.teacher.score_all(torch.tensor([user]))[0].tolist()
        return User(self.student[user].tolist(), teacher, seen, items, self, user)

    def transposed(self) -> World:
        """The same seen from the items."""
        return World(self.teacher.transposed(), self.student.t(), self.seen.transposed())


@dataclass(frozen=True)
class User:
    """One user of a :class:`World` as plain lists, for slow formulas; item 0 is padding.

    Args:
        student: the student's scores of all items.
        teacher: the teacher's scores of all items.
        seen: training items, ascending.
        items: the columns that were selected, 0 for none.
        world: the whole world, for formulas with other users or items.
        id: the id of the user.
    """

    student: list[float]
    teacher: list[float]
    seen: list[int]
    items: list[int]
    world: World
    id: int

    @property
    def listed(self) -> list[int]:
        """The selected items."""
        return [item for item in self.items if item]

    def teacher_top(self, k: int, unseen: bool = False) -> list[int]:
        """The teacher's top-K, without items that it does not list."""
        return [
            int(i) for i in self.world.teacher.top_k(torch.tensor([self.id]), k, unseen)[0] if i
        ]

    def student_top(self, k: int) -> list[int]:
        """The student's top-K."""
        return sorted(range(1, len(self.student)), key=lambda item: -self.student[item])[:k]


def make_world(
    n_users: int = 6,
    n_items: int = 30,
    pairs: Iterable[tuple[int, int]] | None = None,
    seed: int = 0,
) -> World:
    """Random tables; by default user u has seen the items u, 2u and 3u."""
    draw = torch.Generator().manual_seed(seed)
    if pairs is None:
        pairs = [(user, user * times) for user in range(1, n_users + 1) for times in (1, 2, 3)]
    seen = seen_of([(u, i) for u, i in pairs if i <= n_items], n_users + 1, n_items + 1)
    users, items = (torch.randn(n + 1, 4, generator=draw) for n in (n_users, n_items))
    student = users @ items.t() + torch.randn(n_users + 1, n_items + 1, generator=draw)
    student[:, 0] = -torch.inf
    return World(FactorScores(users, items, seen), student, seen)


@dataclass(frozen=True)
class Golden:
    """The authors' arrays and hyper-parameters by name; see tests/golden/README.md."""

    arrays: dict[str, npt.NDArray[Any]]
    meta: dict[str, dict[str, Any]]

    def ids(self, name: str) -> Tensor:
        """Item lists ``[users + 1, T]`` in RecBole's ids: ids are one higher, row 0 is padding."""
        return torch.nn.functional.pad(torch.from_numpy(self.arrays[name]) + 1, (0, 0, 1, 0))

    def table(self, name: str) -> Tensor:
        """A table of factors with a padding row first."""
        return torch.nn.functional.pad(torch.from_numpy(self.arrays[name]), (0, 0, 1, 0))

    def seen(self) -> Seen:
        users, items = torch.from_numpy(self.arrays["train_pairs"] + 1).unbind(1)
        return Seen.from_pairs(
            users, items, len(self.table("teacher_user")), len(self.table("teacher_item"))
        )

    def batch(self, unique: bool = False) -> Tensor:
        """The user of each row, with repeats unless ``unique``."""
        users = torch.from_numpy(self.arrays["batch_users"]) + 1
        return torch.unique(users) if unique else users

    def lists(self, users: Tensor) -> Candidates:
        teacher = Table(self.table("teacher_user") @ self.table("teacher_item").t(), self.seen())
        student = self.table("student_user") @ self.table("student_item").t()
        student[:, 0] = -torch.inf
        return Candidates(users, teacher, ranking_of(student), self.seen(), torch.Generator())

    def check(
        self, prefix: str, total: str, loss: KDLoss, users: Tensor, sets: ItemSets, tolerance: float
    ) -> None:
        """Compare the sum over the rows with the authors', and its gradients by the tables."""
        user_table = self.table("student_user").requires_grad_()
        item_table = self.table("student_item").requires_grad_()
        scores = (user_table[users].unsqueeze(1) * item_table[sets.items]).sum(-1)
        value = loss.forward(scores, sets).sum()
        torch.autograd.backward(value)
        assert relative_error(value.detach(), self.arrays[f"{prefix}{total}"]) < tolerance
        for table, name in ((user_table, "grad_user"), (item_table, "grad_item")):
            assert table.grad is not None
            assert not table.grad[0].any()  # padding
            assert relative_error(table.grad[1:], self.arrays[f"{prefix}{name}"]) < tolerance


def relative_error(found: Tensor, expected: npt.NDArray[Any]) -> float:
    """The largest difference, relative to the largest expected value."""
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


def read_golden(path: Path) -> Golden:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
        return Golden(arrays, json.loads(str(file["meta"])))
