"""The candidates of rows against plain Python on random tables: which items, and the target."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.types import ItemSets, Seen
from recbole_rcekd.losses import CELoss, FCELoss, RCELoss
from recbole_rcekd.losses.ce import CESettings
from recbole_rcekd.losses.fce import FCESettings
from recbole_rcekd.losses.rce import RCESettings
from recbole_rcekd.training.sequence_candidates import (
    RowTeacher,
    SequenceCandidates,
    row_teacher_of,
)
from tests.tables import Table, ranking_of, seen_of

N_ITEMS, N_USERS, WIDTH, K = 14, 4, 4, 5


class Scene(NamedTuple):
    """Sequences of users, cut into rows; what both sides say."""

    taken: list[list[int]]  # by user, in order of time; user 0 is padding
    rows: list[tuple[int, int]]  # a row's user, and the place of its target in the user's sequence
    batch: list[int]  # numbers of rows
    by_user: Tensor  # a general teacher's scores
    by_row: Tensor  # a sequential one's
    student: Tensor  # of the places of the batch

    def row(self, place: int) -> tuple[int, list[int], int]:
        """User, sequence and target."""
        user, at = self.rows[self.batch[place]]
        return user, self.taken[user][:at][-WIDTH:], self.taken[user][at]

    def interaction(self) -> Interaction:
        found = [self.row(place) for place in range(len(self.batch))]
        lists = [sequence + [0] * (WIDTH - len(sequence)) for _, sequence, _ in found]
        return Interaction(
            {"item_id": torch.tensor([r[2] for r in found]), "item_id_list": torch.tensor(lists)}
        )

    def lists(
        self, general: bool, seed: int = 0, teacher: Table | None = None
    ) -> SequenceCandidates:
        pairs = [(user, item) for user, items in enumerate(self.taken) for item in items]
        seen = seen_of(pairs, N_USERS + 1, N_ITEMS)
        if general:
            users = torch.tensor([user for user, _ in self.rows])
            teaching = RowTeacher(
                teacher or Table(self.by_user, seen),
                N_ITEMS,
                "item_id",
                "item_id_list",
                users,
                seen,
            )
        else:
            nothing = Seen.nothing(len(self.rows), N_ITEMS)
            teaching = RowTeacher(
                teacher or Table(self.by_row, nothing), N_ITEMS, "item_id", "item_id_list"
            )
        ranking = ranking_of(padded(self.student))
        generator = torch.Generator().manual_seed(seed)
        return SequenceCandidates(
            torch.tensor(self.batch), teaching, self.interaction(), ranking, generator
        )

    def teacher_row(self, place: int, general: bool) -> list[float]:
        number = self.batch[place]
        found: list[float] = (
            self.by_user[self.rows[number][0]] if general else self.by_row[number]
        ).tolist()
        return found

    def hidden(self, place: int, general: bool) -> set[int]:
        user, _, target = self.row(place)
        return set(self.taken[user]) - {target} if general else set()

    def seen(self, place: int, general: bool) -> set[int]:
        user, sequence, target = self.row(place)
        return set(self.taken[user]) if general else {*sequence, target}


def padded(scores: Tensor) -> Tensor:
    scores = scores.clone()
    scores[:, 0] = -torch.inf
    return scores


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    ids = st.integers(1, N_ITEMS - 1)
    taken = [[], *(draw(st.lists(ids, min_size=2, max_size=8)) for _ in range(N_USERS))]
    rows = [(user, at) for user in range(1, N_USERS + 1) for at in range(1, len(taken[user]))]
    batch = draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5, unique=True))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    by_user, by_row, student = (
        torch.randn(n, N_ITEMS, generator=noise, dtype=torch.float64)
        for n in (N_USERS + 1, len(rows), len(batch))
    )
    return Scene(taken, rows, batch, by_user, by_row, student)


def best(scores: list[float], without: set[int], k: int) -> list[int]:
    chosen = sorted((i for i in range(1, N_ITEMS) if i not in without), key=lambda i: -scores[i])[
        :k
    ]
    return chosen + [0] * (k - len(chosen))


BOTH = pytest.mark.parametrize(
    "general", [False, True], ids=["sequential teacher", "general teacher"]
)


@BOTH
@given(scene=scenes(), k=st.integers(1, N_ITEMS - 1))
def test_lists_against_plain_python(general: bool, scene: Scene, k: int) -> None:
    lists = scene.lists(general)
    found = {
        (who, unseen): getattr(lists, f"{who}_top")(k, unseen=unseen).tolist()
        for who in ("student", "teacher")
        for unseen in (False, True)
    }
    for place in range(len(scene.batch)):
        rows = {
            "student": scene.student[place].tolist(),
            "teacher": scene.teacher_row(place, general),
        }
        for who, scores in rows.items():
            assert found[who, False][place] == best(scores, scene.hidden(place, general), k)
            assert found[who, True][place] == best(scores, scene.seen(place, general), k)
    if general:  # the target is in what is left of the lists, wherever its score is high enough
        targets = [scene.row(place)[2] for place in range(len(scene.batch))]
        everything = lists.teacher_top(N_ITEMS - 1).tolist()
        assert all(target in listed for target, listed in zip(targets, everything, strict=True))


@BOTH
@given(scene=scenes(), n=st.integers(1, 6), outside=st.integers(1, 3))
def test_draws_and_counts_of_unseen_and_of_hidden_items(
    general: bool, scene: Scene, n: int, outside: int
) -> None:
    lists = scene.lists(general)
    top = lists.student_top(outside, unseen=True)
    for draw, left_out in ((lists.draw_unseen, scene.seen), (lists.draw, scene.hidden)):
        drawn = draw(n, top)
        assert drawn.shape == (len(scene.batch), n)
        for place, row in enumerate(drawn.tolist()):
            allowed = set(range(1, N_ITEMS)) - left_out(place, general) - set(top[place].tolist())
            assert set(row) - {0} <= allowed
            assert len(set(row) - {0}) == min(n, len(allowed))
    for place in range(len(scene.batch)):
        assert int(lists.n_unseen()[place]) == N_ITEMS - 1 - len(scene.seen(place, general))
        assert int(lists.n_allowed()[place]) == N_ITEMS - 1 - len(scene.hidden(place, general))


@BOTH
@given(scene=scenes())
@settings(max_examples=20)
def test_teacher_scores(general: bool, scene: Scene) -> None:
    lists = scene.lists(general)
    items = torch.randint(
        1, N_ITEMS, (len(scene.batch), 4), generator=torch.Generator().manual_seed(1)
    )
    cells, everything = lists.teacher_scores(items), lists.teacher_scores_of_all()
    student = lists.mask_rows(scene.student)
    for place in range(len(scene.batch)):
        scores, hidden = scene.teacher_row(place, general), scene.hidden(place, general)
        assert cells[place].tolist() == [scores[i] for i in items[place].tolist()]
        assert everything[place].tolist() == [
            -math.inf if i in hidden | {0} else scores[i] for i in range(N_ITEMS)
        ]
        own = scene.student[place].tolist()
        assert student[place].tolist() == [
            -math.inf if i in hidden else own[i] for i in range(N_ITEMS)
        ]
    assert torch.isfinite(scene.student).all()  # not in place
    assert torch.isfinite(scene.by_user).all()


@given(scenes())
@settings(max_examples=20)
def test_no_list_of_rce_knows_what_a_row_must_not_hear_of(scene: Scene) -> None:
    loss = RCELoss(RCESettings(rce_top_k=3, rce_samples=3, rce_pool=5))
    sets = loss.select(scene.lists(general=True))
    for place, row in enumerate(sets.items.tolist()):
        assert not set(row) & scene.hidden(place, True)


@BOTH
@given(scene=scenes())
@settings(max_examples=20)
def test_an_estimated_normaliser_with_everything_in_its_sample_is_that_of_what_is_not_hidden(
    general: bool, scene: Scene
) -> None:
    lists, student = scene.lists(general), padded(scene.student)
    whole = FCELoss(FCESettings(fce_top_k=3))
    estimated = FCELoss(FCESettings(fce_top_k=3, fce_normaliser="sampled", fce_samples=N_ITEMS))
    sets = estimated.select(lists)
    found = estimated.forward(student.gather(1, sets.items), sets)
    torch.testing.assert_close(found, whole.forward(lists.mask_rows(student), whole.select(lists)))


# --- what a teacher says nothing of ---------------------------------------------------------------


class Silent(Table):
    """Says nothing of user 1."""

    def __init__(self, scores: Tensor, seen: Seen) -> None:
        super().__init__(scores, seen)
        self.scores[1] = -torch.inf


def plain_scene() -> Scene:
    draw = torch.Generator().manual_seed(0)
    taken = [[], [3, 5, 7, 9], [1, 2, 4], [6, 8], [1, 10]]
    rows = [(user, at) for user in range(1, 5) for at in range(1, len(taken[user]))]
    student = torch.randn(len(rows), N_ITEMS, generator=draw, dtype=torch.float64)
    by_user, by_row = (
        torch.randn(n, N_ITEMS, generator=draw, dtype=torch.float64) for n in (5, len(rows))
    )
    return Scene(taken, rows, list(range(len(rows))), by_user, by_row, student)


@pytest.mark.parametrize(
    "loss",
    [
        CELoss(CESettings(ce_top_k=3)),
        CELoss(CESettings(ce_top_k=3, ce_items="union")),
        FCELoss(FCESettings(fce_top_k=3)),
        FCELoss(FCESettings(fce_target="all")),
        RCELoss(RCESettings(rce_top_k=3, rce_samples=2, rce_pool=5)),
    ],
    ids=["ce", "ce on the union", "fce", "fce of all", "rce"],
)
def test_rows_of_users_without_an_opinion_are_not_taught(loss: Any) -> None:
    scene = plain_scene()
    seen = seen_of(
        [(u, i) for u, items in enumerate(scene.taken) for i in items], N_USERS + 1, N_ITEMS
    )
    lists = scene.lists(True, teacher=Silent(scene.by_user, seen))
    silent = torch.tensor([scene.rows[number][0] == 1 for number in scene.batch])
    assert not lists.teacher_top(4)[silent].any()
    sets = loss.select(lists)
    scores = padded(scene.student)
    if loss.scores_all_items:
        values = loss.forward(
            scores,
            ItemSets(sets.items, lists.teacher_scores_of_all()) if loss.teaches_all_items else sets,
        )
    else:
        values = loss.forward(scores.gather(1, sets.items), sets)
    assert torch.isfinite(values).all()
    assert not values[silent].any()
    assert (values[~silent] > 0).all()


def test_a_row_from_which_the_first_item_is_hidden_is_taught_all_the_same() -> None:
    """User 2 took item 1, and then 2 and 4."""
    scene = plain_scene()
    place = scene.rows.index((2, 1))
    scores = scene.lists(True).teacher_scores_of_all()
    assert scores[place, 1] == -torch.inf
    loss = FCELoss(FCESettings(fce_target="all"))
    found = loss.forward(
        padded(scene.student), ItemSets(torch.zeros((len(scores), 0), dtype=torch.int64), scores)
    )
    row, own = scene.teacher_row(place, True), scene.student[place].tolist()
    allowed = [i for i in range(1, N_ITEMS) if i not in (1, 4)]
    mass = sum(math.exp(row[i]) for i in allowed)
    normaliser = math.log(sum(math.exp(own[i]) for i in allowed))
    expected = sum(math.exp(row[i]) / mass * (normaliser - own[i]) for i in allowed)
    assert float(found[place]) == pytest.approx(expected)


# --- which kind a teacher is ----------------------------------------------------------------------


class FakeData:
    """Three rows of two users."""

    config = {"LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_"}  # noqa: RUF012
    uid_field, iid_field, item_num = "user_id", "item_id", 9

    def __init__(self, user_num: int = 5) -> None:
        self.user_num = user_num
        self.item_id_list_field = "item_id_list"
        self.inter_feat = Interaction(
            {
                "user_id": torch.tensor([1, 1, 2]),
                "item_id": torch.tensor([4, 5, 7]),
                "item_id_list": torch.tensor([[3, 0], [3, 4], [6, 0]]),
            }
        )

    def __len__(self) -> int:
        return 3


def table_of(n: int) -> Table:
    return Table(torch.zeros(n, 9), Seen.nothing(n, 9))


def test_scores_of_rows_and_of_users() -> None:
    of_rows = row_teacher_of(FakeData(), table_of(3))
    assert (of_rows.users, of_rows.taken) == (None, None)
    assert (of_rows.n_items, of_rows.item_field, of_rows.list_field) == (
        9,
        "item_id",
        "item_id_list",
    )
    of_users = row_teacher_of(FakeData(), table_of(5))
    assert of_users.users is not None
    assert of_users.taken is not None
    assert of_users.users.tolist() == [1, 1, 2]
    owned = [[], [3, 4, 5], [6, 7], [], []]
    assert [of_users.taken.cells(torch.tensor([user]))[1].tolist() for user in range(5)] == owned


def test_as_many_rows_as_users() -> None:
    data = FakeData(user_num=3)
    assert row_teacher_of(data, table_of(3)).users is None
    assert row_teacher_of(data, table_of(3), by_rows=True).users is None
    assert row_teacher_of(data, table_of(3), by_rows=False).users is not None


def test_scores_of_neither_are_refused() -> None:
    with pytest.raises(
        TeacherError, match=r"scores 4 contexts, but the training data have 3 rows and 5 users"
    ):
        row_teacher_of(FakeData(), table_of(4))
