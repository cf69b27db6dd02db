from __future__ import annotations

import math

import pytest
import torch

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.rrd import RRDLoss, RRDSettings
from tests.reference.rrd import rrd
from tests.tables import Golden, make_world

LN = math.log


def test_by_hand() -> None:
    # Weights e^s: interesting 3 and 1, uninteresting 1 and 1. First choice 3 of 6, then 1 of 3.
    scores = torch.tensor([[LN(3), 0.0, 0.0, 0.0]], dtype=torch.float64)
    sets = ItemSets(torch.tensor([[1, 2, 3, 4]]), keep=torch.ones(1, 4, dtype=torch.bool))
    loss = RRDLoss(RRDSettings(rrd_top_k=2, rrd_rest=2))
    assert loss.forward(scores, sets).item() == pytest.approx(-LN(3 / 6 * 1 / 3), abs=1e-12)
    # The order of the head matters (1 of 6, then 3 of 5), the order of the rest does not.
    assert loss.forward(scores[:, [1, 0, 2, 3]], sets).item() == pytest.approx(
        -LN(1 / 6 * 3 / 5), abs=1e-12
    )
    # One uninteresting item less: 3 of 5, then 1 of 2.
    sets = ItemSets(sets.items, keep=torch.tensor([[True, True, False, True]]))
    assert loss.forward(scores, sets).item() == pytest.approx(-LN(3 / 5 * 1 / 2), abs=1e-12)


@pytest.mark.parametrize(("k", "rest"), [(1, 1), (4, 3), (3, 6)])
def test_equals_the_slow_version_under_any_mask(k: int, rest: int) -> None:
    student = torch.randn(40, k + rest, dtype=torch.float64) * 2
    keep = torch.rand(40, k + rest) < 0.7
    loss = RRDLoss(RRDSettings(rrd_top_k=k, rrd_rest=rest))
    found = loss.forward(student, ItemSets(torch.ones(40, k + rest).long(), keep=keep))
    for row in range(40):
        head = [i for i in range(k) if keep[row, i]]
        tail = [i for i in range(k, k + rest) if keep[row, i]]
        assert found[row].item() == pytest.approx(rrd(student[row].tolist(), head, tail), abs=1e-10)


def test_authors_numbers(golden: Golden) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, class RRD
    settings = golden.meta["rrd_"]
    users = golden.batch(unique=True)
    candidates = golden.lists(users)
    top = candidates.teacher_top(settings["rrd_mxK"], unseen=True)
    assert torch.equal(top, golden.ids("rrd_teacher_top")[users])
    items = torch.cat([golden.ids("rrd_interesting"), golden.ids("rrd_uninteresting")], 1)[users]
    sets = ItemSets(items, keep=items != 0)
    loss = RRDLoss(
        RRDSettings(
            rrd_top_k=settings["rrd_K"], rrd_rest=settings["rrd_L"], rrd_pool=settings["rrd_mxK"]
        )
    )
    golden.check("rrd_", "loss_sum_unique_users", loss, users, sets, 1e-10)


def test_scores_of_more_than_80_still_teach() -> None:
    # The authors cut scores at 80, which stops the gradient; the log-space form has no need to.
    scores = torch.tensor([[90.0, 95.0, 100.0]], requires_grad=True)
    sets = ItemSets(torch.tensor([[1, 2, 3]]), keep=torch.ones(1, 3, dtype=torch.bool))
    value = RRDLoss(RRDSettings(rrd_top_k=2, rrd_rest=1)).forward(scores, sets)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert (gradient.abs() > 1e-5).all()


def test_selection() -> None:
    world = make_world()
    loss = RRDLoss(RRDSettings(rrd_top_k=4, rrd_rest=5, rrd_pool=9))
    sets = loss.select(world.lists())
    pool = world.lists().teacher_top(9, unseen=True).tolist()
    assert sets.keep is not None
    assert sets.keep.all()
    for row, items in enumerate(sets.items.tolist()):
        head, tail = items[:4], items[4:]
        assert head == [item for item in pool[row] if item in head]  # in the teacher's order
        assert len(set(items)) == 9
        assert not set(tail) & {0, *pool[row], row + 1, 2 * (row + 1), 3 * (row + 1)}


def test_without_sampling() -> None:
    world = make_world()
    loss = RRDLoss(RRDSettings(rrd_top_k=4, rrd_rest=5, rrd_sample=False))
    sets = loss.select(world.lists())
    assert torch.equal(sets.items, world.lists().teacher_top(9, unseen=True))
    assert not loss.renewed
    assert RRDLoss(RRDSettings()).renewed


def test_what_a_user_lacks_is_masked() -> None:
    # 30 items, 9 + 5 are drawn; user 1 has 6 unseen items, user 2 has 20, user 3 all 30.
    pairs = [(1, i) for i in range(1, 25)] + [(2, i) for i in range(1, 11)]
    world = make_world(3, 30, pairs)
    for sample in (True, False):
        loss = RRDLoss(RRDSettings(rrd_top_k=9, rrd_rest=5, rrd_pool=12, rrd_sample=sample))
        sets = loss.select(world.lists())
        assert sets.keep is not None
        assert sets.keep[:, :9].sum(1).tolist() == [6, 9, 9]
        assert sets.keep[:, 9:].sum(1).tolist() == [0, 5, 5]
        assert torch.equal(sets.keep, sets.items != 0)
        value = loss.forward(world.student[1:].gather(1, sets.items), sets)
        assert value.isfinite().all()
        kept = sets.items[0][sets.keep[0]].tolist()
        assert value[0].item() == pytest.approx(rrd(world.student[1].tolist(), kept, []), rel=1e-5)


def test_a_short_catalogue_shortens_the_pool_and_leaves_the_rest() -> None:
    # 30 items, the pool could be 500: 5 must stay outside it.
    world = make_world(200, 30, pairs=[(1, 1), (1, 2)])
    sets = RRDLoss(RRDSettings(rrd_top_k=4, rrd_rest=5)).select(world.lists())
    assert sets.keep is not None
    assert sets.keep.all()
    top = world.lists().teacher_top(30, unseen=True)
    assert not (sets.items[0, 4:].unsqueeze(1) == top[0, : 30 - 2 - 5]).any()
    assert not (sets.items[1:, 4:].unsqueeze(2) == top[1:, : 30 - 5].unsqueeze(1)).any()


def test_sharp_and_flat_sampling() -> None:
    # p ∝ e^{−rank/T}: T → 0 takes the best K.
    world = make_world()
    sets = RRDLoss(
        RRDSettings(rrd_top_k=4, rrd_rest=5, rrd_pool=9, rrd_sampling_temperature=1e-3)
    ).select(world.lists())
    assert torch.equal(sets.items[:, :4], world.lists().teacher_top(4, unseen=True))


def test_item_side() -> None:
    assert RRDLoss(RRDSettings()).item_side() is None
    side = RRDLoss(RRDSettings(rrd_top_k=4, rrd_rest=5, rrd_item_weight=0.3)).item_side()
    assert side is not None
    loss, weight = side
    assert weight == 0.3
    assert loss.item_side() is None
    # Users are drawn for each item. User u has seen the items u, 2u and 3u.
    world = make_world(30, 6)
    by_item = world.transposed()
    sets = loss.select(by_item.lists())
    assert sets.items.shape == (6, 9)
    scores = world.teacher.score_all(torch.arange(31)).t()
    for item in range(1, 7):
        users = sets.items[item - 1].tolist()
        assert not {item, item / 2, item / 3} & set(users)
        interesting = [float(scores[item, user]) for user in users[:4]]
        assert interesting == sorted(interesting, reverse=True)


@pytest.mark.parametrize("sample", [True, False])
def test_item_side_with_fewer_users_than_are_drawn(sample: bool) -> None:
    # 7 users, 4 + 5 are drawn: the head is full, the rest are the 3 remaining users.
    world = make_world(7, 20, pairs=[])
    by_item = world.transposed()
    loss = RRDLoss(RRDSettings(rrd_top_k=4, rrd_rest=5, rrd_sample=sample))
    sets = loss.select(by_item.lists())
    assert sets.items.shape == (20, 9)
    assert sets.keep is not None
    assert sets.keep.sum(1).tolist() == [7] * 20
    by_teacher = by_item.teacher.top_k(torch.arange(1, 21), 7, unseen=True)
    student = by_item.student[1:].double()
    value = loss.forward(student.gather(1, sets.items), sets)
    for row in range(20):
        head = by_teacher[row, :4].tolist()
        assert sets.items[row, :4].tolist() == head
        assert value[row].item() == pytest.approx(
            rrd(student[row].tolist(), head, by_teacher[row, 4:].tolist())
        )


def test_a_mask_is_required() -> None:
    with pytest.raises(ValueError, match="keep"):
        RRDLoss(RRDSettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))
