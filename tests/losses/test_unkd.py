from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets, TeacherScores
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.unkd import UnKDLoss, UnKDSettings, draw_pairs, popularity_groups, quotas
from recbole_rcekd.teachers.listed_scores import ListedScores
from tests.reference.unkd import groups, pair_probabilities, unkd
from tests.tables import World, make_world

LN2, LN3 = math.log(2), math.log(3)


def prepared(n_contexts: int = 7, **settings: int | float) -> UnKDLoss:
    small = {"unkd_groups": 2, "unkd_pairs": 5, "unkd_pool": 7}
    loss = UnKDLoss(UnKDSettings(**{**small, **settings}))  # type: ignore[arg-type]
    loss.prepare(n_contexts, torch.device("cpu"))
    return loss


def pairs_of(sets: ItemSets, row: int) -> list[tuple[int, int]]:
    n = sets.items.shape[1] // 2
    return list(zip(sets.items[row, :n].tolist(), sets.items[row, n:].tolist(), strict=True))


# --- the formula ----------------------------------------------------------------------------------


def test_by_hand() -> None:
    # Pairs (1, 2) and (3, 4): even costs ln 2, and ln 3 the wrong way round costs ln(1 + 3).
    loss = UnKDLoss(UnKDSettings(unkd_pairs=2))
    scores = torch.tensor([[0.5, 0.0, 0.5, LN3]], dtype=torch.float64)
    assert loss.forward(scores, ItemSets(torch.tensor([[1, 3, 2, 4]]))).item() == pytest.approx(
        (LN2 + 2 * LN2) / 2
    )
    # Without the second pair.
    assert loss.forward(scores, ItemSets(torch.tensor([[1, 0, 2, 0]]))).item() == pytest.approx(LN2)
    assert loss.forward(scores, ItemSets(torch.tensor([[0, 0, 0, 0]]))).item() == 0


def test_equals_the_slow_version_under_any_mask() -> None:
    student = torch.randn(40, 12, dtype=torch.float64) * 2
    kept = torch.rand(40, 6) < 0.7
    found = UnKDLoss(UnKDSettings(unkd_pairs=6)).forward(
        student, ItemSets(torch.cat([kept, kept], 1).long())
    )
    for row in range(40):
        pairs = [(i, i + 6) for i in range(6) if kept[row, i]]
        assert found[row].item() == pytest.approx(unkd(student[row].tolist(), pairs), abs=1e-10)


@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_an_empty_pair_has_no_gradient(garbage: float) -> None:
    scores = torch.tensor([[0.5, garbage, 0.0, garbage]], requires_grad=True)
    value = UnKDLoss(UnKDSettings(unkd_pairs=2)).forward(
        scores, ItemSets(torch.tensor([[1, 0, 2, 0]]))
    )
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    half = 1 / (1 + math.exp(0.5))
    assert gradient[0].tolist() == pytest.approx([-half, 0.0, half, 0.0])


# --- groups and quotas ----------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    # 12 interactions, so 4 for each group: 4, then 2 + 2, then the rest. Items without interactions
    # and padding are in the last group.
    popularity = torch.tensor([0, 1, 4, 2, 0, 2, 1, 1, 1])
    assert popularity_groups(popularity, 3).tolist() == [2, 2, 0, 1, 2, 1, 2, 2, 2]
    # One item has more than a group's share: the groups that it covers have no other item.
    assert popularity_groups(torch.tensor([0, 1, 18, 1]), 4).tolist() == [3, 3, 0, 3]


@pytest.mark.parametrize("n_groups", [1, 2, 4, 7])
def test_groups_are_those_of_a_plain_loop(n_groups: int) -> None:
    draw = torch.Generator().manual_seed(n_groups)
    for _ in range(20):
        popularity = (torch.rand(80, generator=draw) ** 4 * 30).long()
        popularity[0] = 0
        assert popularity_groups(popularity, n_groups).tolist() == groups(
            popularity.tolist(), n_groups
        )


def test_groups_have_about_the_same_number_of_interactions() -> None:
    popularity = (1000 / torch.arange(1, 2000)).long()
    group = popularity_groups(popularity, 4)
    totals = torch.bincount(group, weights=popularity.double())
    assert (totals / totals.sum() - 1 / 4).abs().max() < popularity.max() / popularity.sum()
    assert (torch.bincount(group).diff() > 0).all()  # ever more items, ever less popular


@pytest.mark.parametrize(
    ("n", "power", "expected"),
    [
        (30, 0.0, [10, 10, 10]),
        (8, 0.0, [3, 3, 2]),
        # Mean popularity 10, 4, 2: shares of the least 0.2, 0.5 and 1.
        (17, 1.0, [2, 5, 10]),
        (129, 2.0, [4, 25, 100]),
        (2, 1.0, [0, 1, 1]),
    ],
)
def test_quotas_by_hand(n: int, power: float, expected: list[int]) -> None:
    popularity, group = torch.tensor([0, 10, 4, 4, 2, 2]), torch.tensor([2, 0, 1, 1, 2, 2])
    assert quotas(popularity, group, 3, n, power) == expected


def test_a_quota_is_cut_at_a_tenth_and_an_empty_group_has_none() -> None:
    # Mean popularity 100 and 2: a share of 0.02, counted as 0.1.
    assert quotas(torch.tensor([0, 100, 2]), torch.tensor([2, 0, 2]), 3, 11, 1.0) == [1, 0, 10]
    # The last group has no interaction: it counts as popular as the least popular other group.
    assert quotas(torch.tensor([0, 4, 2, 0]), torch.tensor([2, 0, 1, 2]), 3, 5, 1.0) == [1, 2, 2]
    assert quotas(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), 2, 5, 1.0) == [0, 5]


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_are_two_draws_repeated_until_they_differ() -> None:
    weights = torch.tensor([0.5, 0.0, 0.3, 0.1, 0.1])
    a, b = draw_pairs(weights.expand(4, 5), 3000, torch.Generator().manual_seed(0))
    assert a.shape == b.shape == (4, 3000)
    counts = Counter(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    expected = {pair: p for pair, p in pair_probabilities(weights.tolist()).items() if p > 0}
    assert set(counts) == set(expected)
    likely = np.array(list(expected.values())) * 12000
    assert scipy.stats.chisquare([counts[pair] for pair in expected], likely).pvalue > 1e-3


def test_rows_have_their_own_weights() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.9], [0.0, 0.7, 0.0], [0.0, 0.0, 0.0]])
    a, b = draw_pairs(weights, 50, torch.Generator().manual_seed(0))
    assert set(zip(a[0].tolist(), b[0].tolist(), strict=True)) == {(0, 1)}
    assert set(zip(a[1].tolist(), b[1].tolist(), strict=True)) == {(1, 2)}
    assert torch.equal(a[2:], b[2:])  # no two places


# --- selection ------------------------------------------------------------------------------------


def test_pairs_are_unseen_of_one_group_and_in_the_teachers_order() -> None:
    world = make_world(20, 60)
    sets = prepared(21, unkd_groups=3, unkd_pairs=7).select(world.lists())
    group = popularity_groups(world.lists().popularity(), 3).tolist()
    scores = world.teacher.score_all(torch.arange(21))
    for row in range(20):
        user, pairs = row + 1, pairs_of(sets, row)
        assert [group[a] for a, _ in pairs] == [0, 0, 0, 1, 1, 2, 2]
        for a, b in pairs:
            assert group[a] == group[b]
            assert not {user, 2 * user, 3 * user, 0} & {a, b}
            assert scores[user, a] > scores[user, b]
            better = [
                i
                for i in range(1, 61)
                if group[i] == group[a] and scores[user, i] >= scores[user, b] and i % user
            ]
            assert len(better) <= 7 + 3  # in the pool of 7, what is seen not counted


def test_a_group_with_too_few_items_has_no_pair() -> None:
    # Group 0 is item 1 alone; group 1 the rest, of which user 2 has seen all but one.
    pairs = [(u, 1) for u in (3, 4, 5, 6, 7, 8, 9)] + [(2, i) for i in range(2, 9)]
    sets = prepared(10).select(make_world(9, 9, pairs).lists(torch.tensor([1, 2])))
    assert not sets.items[1].any()
    assert sets.items[0].reshape(2, 5).bool().tolist() == [[False] * 3 + [True] * 2] * 2


def test_fewer_pairs_than_groups() -> None:
    sets = prepared(unkd_pairs=1).select(make_world().lists())
    assert sets.items.shape == (6, 2)


class Counted(TeacherScores):
    """A teacher that counts for which users all its scores are asked for."""

    def __init__(self, world: World) -> None:
        self._teacher = world.teacher
        self.n_contexts, self.n_items = world.teacher.n_contexts, world.teacher.n_items
        self.asked: list[int] = []

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        raise AssertionError

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        raise AssertionError

    def score_all(self, contexts: Tensor) -> Tensor:
        self.asked += contexts.tolist()
        return self._teacher.score_all(contexts)

    def transposed(self) -> Counted:
        raise AssertionError


def test_the_teachers_scores_are_computed_once_for_each_user() -> None:
    world = make_world()
    teacher = Counted(world)
    counted, loss = World(teacher, world.student, world.seen), prepared()
    some, more = (
        counted.lists(torch.tensor([2, 5]), seed=1),
        counted.lists(torch.tensor([5, 1, 2]), seed=1),
    )
    teacher.asked.clear()
    first = loss.select(some)
    assert teacher.asked == [2, 5]
    second = loss.select(more)
    assert teacher.asked == [2, 5, 1]
    assert not torch.equal(first.items[0], second.items[2])  # but the pairs are new
    again = prepared().select(counted.lists(torch.tensor([5, 1, 2]), seed=1))
    assert torch.equal(again.items, second.items)


def test_top_items_are_kept_by_ids_and_not_saved() -> None:
    world = make_world()
    loss = prepared(200)
    candidates = world.lists(torch.tensor([2, 5]))
    candidates.ids = torch.tensor([150, 7])  # as of rows
    expected = prepared().select(world.lists(torch.tensor([2, 5])))
    assert torch.equal(loss.select(candidates).items, expected.items)
    other: Candidates = world.lists(torch.tensor([5, 2]), seed=3)
    other.ids = torch.tensor([7, 150])
    assert torch.equal(
        loss.select(other).items, prepared().select(world.lists(torch.tensor([5, 2]), seed=3)).items
    )
    assert not loss.state_dict()


def test_items_that_a_file_does_not_list_are_in_no_pair() -> None:
    # For user 1 items 4 and 5 are listed; all others have the same score, the floor.
    world = make_world(2, 12, [(1, 1), (2, 2)])
    users, items, scores = (
        torch.tensor([1, 1, 2]),
        torch.tensor([4, 5, 6]),
        torch.tensor([2.0, 3.0, 1.0]),
    )
    teacher = ListedScores.with_floor(users, items, scores, world.seen)
    sets = prepared(3, unkd_groups=1).select(World(teacher, world.student, world.seen).lists())
    assert pairs_of(sets, 0) == [(5, 4)] * 5
    assert pairs_of(sets, 1) == [(0, 0)] * 5
