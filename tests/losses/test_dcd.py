from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.dcd import DCDLoss, DCDSettings, corrections, drawn_items
from tests.reference.dcd import corrections as slow_corrections
from tests.reference.rrd import rrd
from tests.tables import World, make_world

LN = math.log


def test_by_hand() -> None:
    # Weights e^s: the student has items 1 and 2 (3 and 1) too low, 3 and 4 (1 and 1) too high.
    # First 3 of 6, then 1 of 3.
    scores = torch.tensor([[LN(3), 0.0, 0.0, 0.0]], dtype=torch.float64)
    sets = ItemSets(torch.tensor([[1, 2, 3, 4]]), keep=torch.ones(1, 4, dtype=torch.bool))
    loss = DCDLoss(DCDSettings(dcd_items=2))
    assert loss.forward(scores, sets).item() == pytest.approx(-LN(3 / 6 * 1 / 3), abs=1e-12)
    # One too high only: 3 of 5, then 1 of 2.
    sets = ItemSets(torch.tensor([[1, 2, 3, 0]]), keep=torch.tensor([[True, True, True, False]]))
    assert loss.forward(scores, sets).item() == pytest.approx(-LN(3 / 5 * 1 / 2), abs=1e-12)


def test_corrections_by_hand() -> None:
    # The first item has the third position, two too low; the others are one too high.
    under, over = corrections(torch.tensor([[2, 0, 1]]), 10.0)
    assert under[0].tolist() == pytest.approx([math.tanh(0.2), 0.0, 0.0])
    assert over[0].tolist() == pytest.approx([0.0, math.tanh(0.1), math.tanh(0.1)])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 4), (3, 6)])
def test_equals_the_slow_version_under_any_mask(n: int, k: int) -> None:
    student = torch.randn(40, k + n, dtype=torch.float64) * 2
    keep = torch.rand(40, k + n) < 0.7
    found = DCDLoss(DCDSettings(dcd_items=n)).forward(
        student, ItemSets(torch.ones(40, k + n).long(), keep=keep)
    )
    for row in range(40):
        head = [i for i in range(k) if keep[row, i]]
        tail = [i for i in range(k, k + n) if keep[row, i]]
        assert found[row].item() == pytest.approx(rrd(student[row].tolist(), head, tail), abs=1e-10)


def test_what_is_too_low_is_taught_in_order_above_what_is_too_high() -> None:
    world = make_world()
    sets = DCDLoss(DCDSettings(dcd_items=9, dcd_pool=14)).select(world.lists())
    assert sets.keep is not None
    assert torch.equal(sets.keep, sets.items != 0)
    for row in range(6):
        top = world.lists().teacher_top(14, unseen=True)[row].tolist()
        under, over = slow_corrections(world.student[row + 1].tolist(), top, 10.0)
        head, tail = (
            [i for i in part if i]
            for part in (sets.items[row, :9].tolist(), sets.items[row, 9:].tolist())
        )
        assert sets.items[row, :9].tolist() == head + [0] * (
            9 - len(head)
        )  # missing items come last
        too_low, too_high = (
            [i for i, e in zip(top, errors, strict=True) if e > 0] for errors in (under, over)
        )
        assert head == [i for i in top if i in head]  # in the teacher's order
        assert set(head) <= set(too_low)
        assert set(tail) <= set(too_high)
        assert (len(head), len(tail)) == (min(9, len(too_low)), min(9, len(too_high)))


def test_a_student_in_the_teachers_order_learns_nothing() -> None:
    world = make_world()
    agreed = World(world.teacher, world.teacher.score_all(torch.arange(7)), world.seen)
    loss = DCDLoss(DCDSettings(dcd_items=4, dcd_pool=14))
    sets = loss.select(agreed.lists())
    assert not sets.items.any()
    assert loss.forward(agreed.student[1:].gather(1, sets.items), sets).tolist() == [0.0] * 6
    # A student with equal scores does not contradict the teacher.
    same = World(world.teacher, torch.zeros(7, 31), world.seen)
    assert not loss.select(same.lists()).items.any()


def test_draws_follow_the_weights() -> None:
    n = 6000
    pool = torch.arange(1, 6).expand(n, 5)
    weights = torch.tensor([0.1, 0.0, 0.3, 0.2, 0.4]).expand(n, 5)
    drawn = drawn_items(pool, weights, 1, torch.Generator().manual_seed(0), in_order=True)
    counts = torch.bincount(drawn[:, 0], minlength=6).numpy()
    assert counts[[0, 2]].tolist() == [0, 0]
    expected = np.array([0.1, 0.3, 0.2, 0.4]) * n
    assert scipy.stats.chisquare(counts[[1, 3, 4, 5]], expected).pvalue > 1e-3


def test_where_fewer_items_have_a_weight_the_others_are_0() -> None:
    pool, weights = torch.tensor([[7, 8, 9]]), torch.tensor([[0.5, 0.0, 0.1]])
    generator = torch.Generator().manual_seed(0)
    assert drawn_items(pool, weights, 3, generator, in_order=True).tolist() == [[7, 9, 0]]
    assert drawn_items(pool, weights, 5, generator, in_order=True).tolist() == [
        [7, 9, 0, 0, 0]
    ]  # a pool of 3
    orders = {
        tuple(drawn_items(pool, weights, 3, generator, in_order=False)[0].tolist())
        for _ in range(60)
    }  # in the draw's order
    assert orders == {(7, 9, 0), (9, 7, 0)}


def test_item_side() -> None:
    assert DCDLoss(DCDSettings(dcd_item_weight=0.0)).item_side() is None
    side = DCDLoss(DCDSettings(dcd_items=4, dcd_pool=14)).item_side()
    assert side is not None
    loss, weight = side
    assert weight == 1.0
    assert loss.item_side() is None
    # Users are drawn for each item. User u has seen the items u, 2u and 3u.
    world = make_world(30, 6)
    sets = loss.select(world.transposed().lists())
    assert sets.items.shape == (6, 8)
    scores = world.teacher.score_all(torch.arange(31)).t()
    for item in range(1, 7):
        users = [user for user in sets.items[item - 1].tolist() if user]
        assert users
        assert not {item, item / 2, item / 3} & set(users)
        raised = [float(scores[item, user]) for user in sets.items[item - 1, :4] if user]
        assert raised == sorted(raised, reverse=True)


def test_with_fewer_users_than_items_wanted() -> None:
    # The "catalogue" of the item side has 3 users, fewer than the 4 to be drawn.
    world = make_world(3, 20)
    sets = DCDLoss(DCDSettings(dcd_items=4, dcd_pool=4)).select(world.transposed().lists())
    assert sets.items.shape == (20, 8)
    assert not sets.items[:, [3, 7]].any()


def test_the_items_come_out_of_the_pool() -> None:
    with pytest.raises(SettingsError, match=r"\[dcd_items\]=60 is larger than \[dcd_pool\]=50"):
        DCDSettings(dcd_items=60, dcd_pool=50)


def test_a_mask_is_required() -> None:
    with pytest.raises(ValueError, match="keep"):
        DCDLoss(DCDSettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))
