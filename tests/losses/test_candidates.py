from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_rcekd.core.top_k import RowRanking, top_k
from recbole_rcekd.core.types import ItemSets, Seen
from recbole_rcekd.losses.candidates import Candidates
from tests.tables import World, make_world, seen_of

N_USERS, N_ITEMS = 5, 7
pairs_of_any_kind = st.lists(
    st.tuples(st.integers(0, N_USERS - 1), st.integers(1, N_ITEMS - 1)), max_size=25
)


def as_sets(seen: Seen) -> list[set[int]]:
    return [
        set(seen.ids[a:b].tolist()) for a, b in zip(seen.starts[:-1], seen.starts[1:], strict=True)
    ]


# -- Seen ------------------------------------------------------------------------------------------


@given(pairs_of_any_kind)
def test_seen_rows_hold_each_pair_once_in_order(pairs: list[tuple[int, int]]) -> None:
    seen = seen_of(pairs, N_USERS, N_ITEMS)
    expected = [{i for u, i in pairs if u == user} for user in range(N_USERS)]
    assert as_sets(seen) == expected
    assert seen.counts().tolist() == [len(items) for items in expected]
    for a, b in zip(seen.starts[:-1], seen.starts[1:], strict=True):
        assert seen.ids[a:b].tolist() == sorted(seen.ids[a:b].tolist())
    assert seen.contexts().tolist() == [user for user in range(1, N_USERS) if expected[user]]


@given(pairs_of_any_kind, st.lists(st.integers(0, N_USERS - 1), max_size=8))
def test_seen_cells_of_any_users_in_any_order(
    pairs: list[tuple[int, int]], users: list[int]
) -> None:
    rows, items = seen_of(pairs, N_USERS, N_ITEMS).cells(torch.tensor(users, dtype=torch.int64))
    expected = {(row, i) for row, user in enumerate(users) for u, i in pairs if u == user}
    found = list(zip(rows.tolist(), items.tolist(), strict=True))
    assert len(found) == len(expected)
    assert set(found) == expected
    assert found == sorted(found)  # one ascending key, for the binary search of draw_unseen


@given(pairs_of_any_kind)
def test_seen_transposed(pairs: list[tuple[int, int]]) -> None:
    seen = seen_of(pairs, N_USERS, N_ITEMS)
    other = seen.transposed()
    assert other.n_ids == N_USERS
    assert as_sets(other) == [{u for u, i in pairs if i == item} for item in range(N_ITEMS)]
    back = other.transposed()
    assert torch.equal(back.starts, seen.starts)
    assert torch.equal(back.ids, seen.ids)


# -- candidates ------------------------------------------------------------------------------------


def test_top_k_marks_what_has_no_score() -> None:
    rows = torch.tensor([[-torch.inf, 2.0, 5.0, 3.0], [-torch.inf, -torch.inf, 1.0, -torch.inf]])
    assert top_k(rows, 3).tolist() == [[2, 3, 1], [2, 0, 0]]
    assert top_k(rows, 9).tolist() == [[2, 3, 1, 0], [2, 0, 0, 0]]  # no longer than the catalogue


@given(st.data(), st.integers(0, 3), st.integers(1, 70), st.integers(1, 5))
def test_top_k_of_long_rows_with_ties(data: st.DataObject, n: int, width: int, k: int) -> None:
    """Rows with and without the two-step selection; few distinct scores, many missing ones."""
    values = data.draw(
        st.lists(
            st.sampled_from([-torch.inf, -1.0, 0.0, 2.0]), min_size=n * width, max_size=n * width
        )
    )
    rows = torch.tensor(values, dtype=torch.float32).reshape(n, width)
    rows[:, 0] = -torch.inf
    found = top_k(rows, k)
    assert found.shape == (n, min(k, width))
    for row, ids in zip(rows.tolist(), found.tolist(), strict=True):
        real = [item for item in ids if item != 0]
        assert ids == real + [0] * (len(ids) - len(real))
        assert len(real) == len(set(real))
        best = sorted((score for score in row if score > -torch.inf), reverse=True)
        assert [row[item] for item in real] == best[: len(ids)]


@pytest.mark.parametrize("width", [400, 407, 1000])
def test_top_k_of_long_rows(width: int) -> None:
    rows = torch.randn(20, width)
    assert torch.equal(top_k(rows, 12), rows.argsort(1, descending=True)[:, :12])


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_the_top_k_of_teacher_and_student(k: int, unseen: bool) -> None:
    world = make_world()
    contexts = torch.tensor([4, 1, 4])
    candidates = world.lists(contexts)
    for found, scores in (
        (candidates.teacher_top(k, unseen), world.teacher.score_all(torch.arange(7))),
        (candidates.student_top(k, unseen), world.student),
    ):
        for row, user in enumerate(contexts.tolist()):
            allowed = [i for i in range(1, 31) if not (unseen and i in (user, 2 * user, 3 * user))]
            best = sorted(allowed, key=lambda i: -float(scores[user, i]))[:k]
            assert found[row].tolist() == best + [0] * (k - len(best))


def test_users_with_fewer_items_than_asked_for_get_0() -> None:
    # User 1 has seen all but items 3 and 5 of six.
    world = make_world(2, 6, pairs=[(1, i) for i in (1, 2, 4, 6)])
    for found in (
        world.lists().student_top(4, unseen=True),
        world.lists().teacher_top(4, unseen=True),
    ):
        assert sorted(found[0].tolist()) == [0, 0, 3, 5]
        assert found[0, 2:].tolist() == [0, 0]  # the real ones first
        assert (found[1] != 0).all()


def test_the_students_scores_are_computed_only_on_demand() -> None:
    world, calls = make_world(), []

    def student_rows(contexts: torch.Tensor) -> torch.Tensor:
        calls.append(contexts.tolist())
        return world.student[contexts]

    candidates = Candidates(
        torch.tensor([2, 3]),
        world.teacher,
        RowRanking(student_rows, 31),
        world.seen,
        torch.Generator(),
    )
    candidates.teacher_top(3)
    candidates.draw_unseen(2, outside=torch.zeros(2, 0, dtype=torch.int64))
    assert calls == []
    candidates.student_top(3)
    assert calls == [[2, 3]]


@pytest.mark.parametrize("unseen", [False, True])
def test_the_students_top_k_does_not_depend_on_the_blocks(
    unseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    whole = world.lists().student_top(10, unseen)
    monkeypatch.setattr("recbole_rcekd.core.top_k.CELLS_AT_A_TIME", 70)  # two rows of 31
    assert torch.equal(world.lists().student_top(10, unseen), whole)
    monkeypatch.setattr("recbole_rcekd.core.top_k.CELLS_AT_A_TIME", 1)
    assert torch.equal(world.lists().student_top(10, unseen), whole)


def test_scores_of_the_teacher() -> None:
    world = make_world()
    items = torch.tensor([[3, 9], [1, 1]])
    found = world.lists(torch.tensor([5, 2])).teacher_scores(items)
    torch.testing.assert_close(
        found, world.teacher.score_all(torch.tensor([5, 2])).gather(1, items)
    )


# -- draws -----------------------------------------------------------------------------------------


def nothing(world: World) -> torch.Tensor:
    return torch.zeros(len(world.student) - 1, 0, dtype=torch.int64)


@given(st.data(), st.integers(1, 12))
def test_draws_are_distinct_unseen_and_outside(data: st.DataObject, n: int) -> None:
    """In a catalogue of nine items, of which all, some or none are allowed."""
    pairs = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), max_size=36))
    forbidden = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=4, max_size=4),
    )
    world = make_world(4, 9, pairs=pairs)
    drawn = world.lists(seed=n).draw_unseen(n, outside=torch.tensor(forbidden))
    assert drawn.shape == (4, n)
    for row in range(4):
        allowed = set(range(1, 10)) - {i for u, i in pairs if u == row + 1} - set(forbidden[row])
        found = drawn[row].tolist()
        real = [item for item in found if item != 0]
        assert found == real + [0] * (n - len(real))
        assert len(real) == len(set(real)) == min(n, len(allowed))
        assert set(real) <= allowed


@pytest.mark.parametrize("n_allowed", [8, 60])
def test_draws_are_uniform_whether_by_rejection_or_exactly(n_allowed: int) -> None:
    # 200 items, of which 8 or 60 are allowed. With 8, most rows cannot be filled by rejection and
    # are drawn from the full row.
    total = 4000
    world = make_world(total, 200, pairs=[])
    outside = torch.arange(n_allowed + 1, 201).expand(total, -1)
    drawn = world.lists().draw_unseen(4, outside)
    counts = torch.bincount(drawn.flatten(), minlength=n_allowed + 1)
    assert counts[0] == 0
    assert len(counts) == n_allowed + 1
    # Each row has 4 different items, so the counts vary less than χ² supposes: the test is on the
    # safe side.
    assert scipy.stats.chisquare(counts[1:].numpy()).pvalue > 1e-3
    by_place = torch.bincount(drawn[:, 0], minlength=n_allowed + 1)[1:]
    assert scipy.stats.chisquare(by_place.numpy()).pvalue > 1e-3


def test_draws_follow_the_generator() -> None:
    world = make_world()
    outside = nothing(world)
    first, again, other = (world.lists(seed=seed).draw_unseen(5, outside) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    candidates = world.lists()
    assert not torch.equal(candidates.draw_unseen(5, outside), candidates.draw_unseen(5, outside))


def test_draws_leave_the_global_random_state_alone() -> None:
    world = make_world()
    state = torch.get_rng_state()
    world.lists().draw_unseen(25, nothing(world))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_for_no_users() -> None:
    candidates = make_world().lists(torch.zeros(0, dtype=torch.int64))
    assert candidates.draw_unseen(3, torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 3)
    assert candidates.student_top(3, unseen=True).shape == (0, 3)
    assert candidates.teacher_top(3, unseen=True).shape == (0, 3)


# -- ItemSets --------------------------------------------------------------------------------------


def test_sets_can_be_cut_and_filled_by_rows() -> None:
    whole = ItemSets(
        torch.arange(1, 9).reshape(4, 2),
        teacher_scores=torch.randn(4, 2),
        keep=torch.tensor([[True, False]] * 4),
        gamma=torch.rand(4),
    )
    assert set(whole.tensors()) == {"items", "teacher_scores", "keep", "gamma"}
    empty = whole.empty_like(4)
    assert {name: tuple(value.shape) for name, value in empty.tensors().items()} == {
        name: tuple(value.shape) for name, value in whole.tensors().items()
    }
    assert empty.items.dtype == torch.int32
    assert empty.overlap is None
    for part in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        empty.put(part, whole.rows(part))
    for name, value in whole.tensors().items():
        torch.testing.assert_close(empty.tensors()[name], value, check_dtype=name != "items")
