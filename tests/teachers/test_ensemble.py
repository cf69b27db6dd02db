"""Several teachers as one, against full matrices that numpy standardises, averages and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.core.store import Store
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.ensemble import EnsembleScores, ensemble, reciprocal_rank, standardised
from recbole_rcekd.teachers.listed_scores import ListedScores
from recbole_rcekd.teachers.rescale import moments
from recbole_rcekd.teachers.score_tables import DenseScores, FactorScores
from tests.tables import seen_of

N_USERS, N_ITEMS = 7, 12
SEEN = seen_of([(1, 2), (1, 3), (2, 1), (4, 8), (6, 1)], N_USERS, N_ITEMS)
USERS = torch.tensor([3, 1, 6, 1])
ITEMS = torch.tensor([[1, 5, 11], [2, 2, 3], [11, 10, 9], [4, 5, 6]])
Matrix = npt.NDArray[np.float64]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int = 0, d: int = 3) -> FactorScores:
    return FactorScores(draw(seed, N_USERS, d) + 0.5, draw(seed + 50, N_ITEMS, d) + 1.0, SEEN)


def dense(seed: int = 0) -> DenseScores:
    matrix = (draw(seed + 100, N_USERS, N_ITEMS) * 4 - 2).numpy()
    matrix[:, 0] = 0.0
    return DenseScores(matrix, SEEN)


def lists(seed: int = 0, users: Sequence[int] = range(1, N_USERS)) -> ListedScores:
    cells = [
        (u, i)
        for u in users
        for i in range(1, N_ITEMS)
        if (3 * u + 5 * i + seed) % 4 == 0 or i == u
    ]
    table = torch.tensor(cells)
    return ListedScores.with_floor(
        table[:, 0], table[:, 1], draw(seed + 200, len(cells)) * 3 + 5, SEEN
    )


MAKERS: dict[str, Callable[[int], TeacherScores]] = {
    "factors": factors,
    "dense": dense,
    "lists": lists,
}
MIXES = [
    "factors",
    "dense",
    "lists",
    "factors factors",
    "lists lists lists",
    "factors dense",
    "factors lists",
    "dense lists",
    "dense dense factors lists factors lists",
]


def mix(names: str) -> list[TeacherScores]:
    return [MAKERS[name](seed) for seed, name in enumerate(names.split())]


def whole(scores: TeacherScores) -> Matrix:
    """All scores without padding, ``[users, items]``, by the table's own answers."""
    return scores.score_all(torch.arange(scores.n_contexts))[1:, 1:].double().numpy()


def slow(parts: Sequence[TeacherScores], weights: Sequence[float]) -> Matrix:
    """Standardise and average, user after user."""
    total = np.zeros((N_USERS - 1, N_ITEMS - 1))
    for part, weight in zip(parts, weights, strict=True):
        for user, row in enumerate(whole(part)):
            if np.isfinite(row).all() and row.std() > 1e-7 * abs(row.mean()):
                total[user] += weight * (row - row.mean()) / row.std()
    return total / sum(weights)


def close(found: Matrix | Tensor, expected: Matrix | Tensor) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-5)


# --- standardised ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", MIXES)
def test_standardised_equals_the_slow_version(names: str) -> None:
    parts = mix(names)
    weights = [1.0, 0.5, 2.0, 0.25, 3.0, 1.5][: len(parts)]
    scores = standardised(parts, weights, SEEN)
    expected = slow(parts, weights)
    assert (scores.n_contexts, scores.n_items) == (N_USERS, N_ITEMS)
    close(whole(scores), expected)
    close(
        scores.score(USERS, ITEMS.int()), torch.from_numpy(expected)[USERS - 1].gather(1, ITEMS - 1)
    )
    assert (scores.score_all(USERS)[:, 0] == -torch.inf).all()
    assert scores.score_all(USERS).dtype == scores.score(USERS, ITEMS).dtype == torch.float32
    other = scores.transposed()
    close(whole(other), expected.T)
    close(
        other.score(ITEMS[:, 0], USERS.expand(4, -1)),
        torch.from_numpy(expected.T)[ITEMS[:, 0] - 1][:, USERS - 1],
    )
    close(whole(other.transposed()), expected)


@pytest.mark.parametrize("names", MIXES)
def test_lists_of_the_best(names: str) -> None:
    parts = mix(names)
    scores = standardised(parts, [1.0] * len(parts), SEEN)
    expected = slow(parts, [1.0] * len(parts))
    some_list = {
        (int(u), int(i))
        for part in parts
        if isinstance(part, ListedScores)
        for u, i in zip(*part.rows()[:2], strict=True)
    }
    only_listed = isinstance(scores, ListedScores)
    for unseen in (False, True):
        found = scores.top_k(USERS, 5, unseen)
        for row, user in enumerate(USERS.tolist()):
            allowed = [
                item
                for item in range(1, N_ITEMS)
                if not (unseen and (user, item) in [(1, 2), (1, 3), (2, 1), (4, 8), (6, 1)])
                and (not only_listed or (user, item) in some_list)
            ]
            best = sorted(allowed, key=lambda item: -expected[user - 1, item - 1])[:5]
            assert found[row].tolist() == best + [0] * (5 - len(best))


def test_what_comes_out() -> None:
    for names, kind in (
        ("factors factors", FactorScores),
        ("lists lists", ListedScores),
        ("factors dense", EnsembleScores),
    ):
        assert type(standardised(mix(names), [1.0, 1.0], SEEN)) is kind
    # Two tables: as wide as both, no users × items.
    wide = standardised([factors(0, 3), factors(1, 4)], [1.0, 1.0], SEEN)
    assert isinstance(wide, FactorScores)
    assert wide.context_factors.shape == (N_USERS, 7)
    assert wide.item_factors.shape == (N_ITEMS, 7)
    assert not wide.item_factors[0].any()


class Sizes(torch.overrides.TorchFunctionMode):
    """Remembers the largest tensor that is made."""

    largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_matrix_is_made_of_tables_and_lists() -> None:
    n_users, n_items, d = 600, 500, 8
    seen = seen_of([(1, 1)], n_users, n_items)
    parts: list[TeacherScores] = [
        FactorScores(draw(i, n_users, d), draw(i + 9, n_items, d), seen) for i in range(2)
    ]
    users, items = torch.arange(1, n_users), torch.arange(1, n_users) % (n_items - 1) + 1
    listed = ListedScores.with_floor(users, items, draw(3, n_users - 1), seen)
    for some in (parts, [listed, listed.transposed().transposed()], [*parts, listed]):
        with Sizes() as sizes:
            standardised(some, [1.0] * len(some), seen)
        assert 0 < sizes.largest <= n_users * 2 * d


@pytest.mark.parametrize("names", ["factors", "dense", "lists"])
def test_moments(names: str) -> None:
    (part,) = mix(names)
    mean, deviation = moments(part)
    assert mean.dtype == deviation.dtype == torch.float64
    close(mean[1:], whole(part).mean(1))
    close(deviation[1:], whole(part).std(1))


def test_the_deviation_of_nothing_is_0() -> None:
    matrix = draw(1, N_USERS, N_ITEMS)
    matrix[2] = -torch.inf
    mean, deviation = moments(DenseScores(matrix.numpy(), SEEN))
    assert mean[2] == -torch.inf
    assert deviation[2] == 0.0


def shifted(part: FactorScores, scale: Tensor, shift: Tensor) -> FactorScores:
    """Every user's scores times its scale, plus its shift."""
    ones = torch.ones(N_ITEMS, 1)
    return FactorScores(
        torch.cat([part.context_factors * scale, shift], 1),
        torch.cat([part.item_factors, ones], 1),
        SEEN,
    )


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_and_shift_of_a_users_scores_do_not_matter(
    seed: int, scale: float, shift: float
) -> None:
    one, other = factors(seed), factors(seed + 1)
    of_user = draw(seed, N_USERS, 1)
    moved = shifted(one, scale * of_user.exp(), shift * of_user)
    wide = standardised([one, other], [1.0, 2.0], SEEN)
    np.testing.assert_allclose(
        whole(standardised([moved, other], [1.0, 2.0], SEEN)), whole(wide), atol=5e-3
    )
    # The same for a matrix and for lists.
    for part in (dense(seed), lists(seed)):
        moved_part: TeacherScores
        if isinstance(part, DenseScores):
            moved_part = DenseScores(part._matrix * scale + shift, SEEN)
        else:
            users, items, scores = part.rows()
            moved_part = ListedScores.with_floor(users, items, scores * scale + shift, SEEN)
        before, after = (
            standardised([some, other], [1.0, 2.0], SEEN) for some in (part, moved_part)
        )
        np.testing.assert_allclose(whole(after), whole(before), atol=5e-3)


@pytest.mark.parametrize("how", ["standardised", "reciprocal_rank"])
@pytest.mark.parametrize("names", ["factors dense", "dense lists", "lists factors", "lists lists"])
def test_a_weight_of_0_removes_a_teacher(names: str, how: Any) -> None:
    one, other = mix(names)
    with_it = ensemble([one, other], [0.0, 2.0], how, SEEN)
    without = ensemble([other], [2.0], how, SEEN)
    assert type(with_it) is type(without)
    assert np.array_equal(whole(with_it), whole(without))
    assert not np.allclose(whole(ensemble([one, other], [1.0, 2.0], how, SEEN)), whole(without))


@pytest.mark.parametrize("how", ["standardised", "reciprocal_rank"])
@pytest.mark.parametrize("name", ["factors", "dense", "lists"])
def test_one_teacher_alone_keeps_its_ranking(name: str, how: Any) -> None:
    (part,) = mix(name)
    alone = ensemble([part], [3.0], how, SEEN)
    for unseen in (False, True):
        assert torch.equal(alone.top_k(USERS, 6, unseen), part.top_k(USERS, 6, unseen))


def test_weights_are_shares() -> None:
    parts = mix("factors dense lists")
    close(
        whole(standardised(parts, [1, 2, 3], SEEN)), whole(standardised(parts, [10, 20, 30], SEEN))
    )


def test_a_teacher_without_an_opinion_adds_nothing() -> None:
    # Terms that cancel, up to rounding.
    column = draw(8, N_ITEMS, 1)
    row = draw(9, N_USERS, 1)
    cancelling = FactorScores(
        torch.cat([row, 3 * row], 1), torch.cat([3 * column, -column], 1), SEEN
    )
    constant = FactorScores(torch.ones(N_USERS, 2), torch.full((N_ITEMS, 2), 0.1), SEEN)
    flat = DenseScores(np.full((N_USERS, N_ITEMS), 0.3, dtype=np.float32), SEEN)
    other = factors()
    silent: TeacherScores
    for silent in (constant, cancelling, flat):
        close(whole(standardised([silent, other], [1.0, 1.0], SEEN)), slow([other], [1.0]) / 2)


def test_users_whom_a_file_does_not_list() -> None:
    # One list has users 1 and 3, the other 3 and 4: of 2, 5 and 6 nobody says anything.
    one, two = lists(0, [1, 3]), lists(1, [3, 4])
    both = standardised([one, two], [1.0, 1.0], SEEN)
    assert isinstance(both, ListedScores)
    silent = np.isneginf(whole(both)).all(1)
    assert silent.tolist() == [False, True, False, False, True, True]
    close(whole(both)[~silent], slow([one, two], [1.0, 1.0])[~silent])
    assert both.top_k(torch.tensor([2, 5]), 3).tolist() == [[0] * 3] * 2
    # Beside a teacher that knows everybody, they are taught by that one.
    mixed = standardised([one, dense()], [1.0, 1.0], SEEN)
    close(whole(mixed), slow([one, dense()], [1.0, 1.0]))
    assert np.isfinite(whole(mixed)).all()
    close(whole(mixed.transposed()), whole(mixed).T)


def test_lists_are_kept_on_disk(tmp_path: Path) -> None:
    for names in ("factors factors", "factors dense"):
        store = Store(tmp_path / names)
        scores = ensemble(mix(names), [1.0, 1.0], "standardised", SEEN, store)
        scores.top_k(USERS, 4, False)
        dtype = "-float32" if "dense" in names else ""
        assert (tmp_path / names / f"top-4-all-users{dtype}").exists()
        scores.transposed().top_k(torch.tensor([1, 2]), 3, True)
        assert (tmp_path / names / f"top-3-unseen-by-users{dtype}").exists()


# --- reciprocal ranks -----------------------------------------------------------------------------


def test_reciprocal_ranks_by_hand() -> None:
    table = torch.zeros(N_USERS, N_ITEMS)
    table[1, [4, 2, 7]] = torch.tensor([9.0, 8.0, 7.0])
    one = DenseScores(table.numpy(), SEEN)
    two = ListedScores.with_floor(
        torch.tensor([1, 1]), torch.tensor([7, 4]), torch.tensor([3.0, 2.0]), SEEN
    )
    scores = reciprocal_rank([one, two], [1.0, 2.0], SEEN, longest=3)
    # User 1: one says 4, 2, 7; two, which counts double, says 7, 4.
    expected = {4: 1 / 61 + 2 / 62, 2: 1 / 62, 7: 1 / 63 + 2 / 61}
    found = scores.score_all(torch.tensor([1]))[0]
    assert {i: found[i].item() for i in expected} == pytest.approx(expected, rel=1e-6)
    assert not found[[i for i in range(1, N_ITEMS) if i not in expected]].any()
    assert scores.top_k(torch.tensor([1]), 4).tolist() == [[7, 4, 2, 0]]
    assert scores.top_k(torch.tensor([1]), 4, unseen=True).tolist() == [[7, 4, 0, 0]]


@pytest.mark.parametrize("longest", [1, 4, 1000])
def test_reciprocal_ranks_equal_the_slow_version(longest: int) -> None:
    parts: list[TeacherScores] = [factors(1), dense(2), lists(3, [1, 3, 6])]
    weights = [1.0, 0.5, 2.0]
    expected = np.zeros((N_USERS - 1, N_ITEMS - 1))
    for part, weight in zip(parts, weights, strict=True):
        for user, row in enumerate(whole(part)):
            best = sorted(range(N_ITEMS - 1), key=lambda item: -row[item])
            if isinstance(part, ListedScores):
                best = [
                    i
                    for i in best
                    if np.isfinite(row[i]) and row[i] > part.floor()[user + 1].item()
                ]
            for rank, item in enumerate(best[:longest]):
                expected[user, item] += weight / (60 + rank + 1)
    scores = reciprocal_rank(parts, weights, SEEN, longest)
    close(whole(scores), expected)
    close(whole(scores.transposed()), expected.T)
    for row, user in enumerate(USERS.tolist()):
        best = sorted(
            np.flatnonzero(expected[user - 1]), key=lambda item: -expected[user - 1, item]
        )
        assert scores.top_k(USERS, 3)[row].tolist() == ([int(i) + 1 for i in best] + [0] * 3)[:3]


def test_of_whom_nobody_says_anything_there_is_no_list() -> None:
    scores = reciprocal_rank([lists(0, [1, 3])], [1.0], SEEN)
    assert (scores.score_all(torch.tensor([2])) == -torch.inf).all()
    assert scores.top_k(torch.tensor([2]), 2).tolist() == [[0, 0]]


def test_rows_have_no_padding_in_front() -> None:
    """The first of the rows of a sequential student is a row like any other."""
    table = DenseScores(torch.arange(1.0, N_ITEMS + 1).expand(N_USERS, -1).numpy(), SEEN)
    for of_rows in (False, True):
        scores = ensemble([table, table], [1.0, 1.0], "reciprocal_rank", SEEN, of_rows=of_rows)
        assert scores.top_k(torch.tensor([0, 1]), 2, False).tolist() == [
            [11, 10] if of_rows else [0, 0],
            [11, 10],
        ]
