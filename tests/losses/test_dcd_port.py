from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.dcd_port import DCDPortLoss, DCDPortSettings
from tests.reference.dcd_port import weights
from tests.reference.rrd import rrd
from tests.tables import Golden, World, make_world

LN = math.log


def test_by_hand() -> None:
    # Weights e^s: the head 3 and 1, the rest 1 and 1. First 3 of 6, then 1 of 3.
    scores = torch.tensor([[LN(3), 0.0, 0.0, 0.0]], dtype=torch.float64)
    sets = ItemSets(torch.tensor([[1, 2, 3, 4]]), keep=torch.ones(1, 4, dtype=torch.bool))
    loss = DCDPortLoss(DCDPortSettings(dcd_port_items=2))
    assert loss.forward(scores, sets).item() == pytest.approx(-LN(3 / 6 * 1 / 3), abs=1e-12)


def test_authors_numbers(golden: Golden) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, class DCD
    settings = golden.meta["dcd_"]
    users = golden.batch(unique=True)
    candidates = golden.lists(users)
    top = candidates.teacher_top(settings["dcd_mxK"], unseen=True)
    assert torch.equal(top, golden.ids("dcd_teacher_top")[users])
    items = torch.cat([golden.ids("dcd_under"), golden.ids("dcd_over")], 1)[users]
    loss = DCDPortLoss(
        DCDPortSettings(
            dcd_port_items=settings["dcd_K"],
            dcd_port_pool=settings["dcd_mxK"],
            dcd_port_temperature=settings["dcd_T"],
        )
    )
    golden.check(
        "dcd_", "loss_sum_unique_users", loss, users, ItemSets(items, keep=items != 0), 1e-10
    )


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 4), (3, 6)])
def test_equals_the_slow_version_under_any_mask(n: int, k: int) -> None:
    student = torch.randn(40, k + n, dtype=torch.float64) * 2
    keep = torch.rand(40, k + n) < 0.7
    loss = DCDPortLoss(DCDPortSettings(dcd_port_items=n))
    found = loss.forward(student, ItemSets(torch.ones(40, k + n).long(), keep=keep))
    for row in range(40):
        head = [i for i in range(k) if keep[row, i]]
        tail = [i for i in range(k, k + n) if keep[row, i]]
        assert found[row].item() == pytest.approx(rrd(student[row].tolist(), head, tail), abs=1e-10)


def test_draws_follow_the_ranks_among_all_items() -> None:
    # One user many times. Its training items 2 and 3 are the student's best, so all others rank two
    # lower.
    n = 6000
    world = make_world(1, 12, [(1, 2), (1, 3)])
    top = world.lists().teacher_top(6, unseen=True)[0].tolist()
    others = [i for i in range(1, 13) if i not in (2, 3, *top)]
    student = torch.full((2, 13), -torch.inf)
    order = [2, 3, top[5], top[4], top[0], others[0], top[1], *others[1:], top[2], top[3]]
    student[1, order] = -torch.arange(12.0)
    many = torch.ones(n, dtype=torch.int64)
    loss = DCDPortLoss(DCDPortSettings(dcd_port_items=2, dcd_port_pool=6))
    sets = loss.select(World(world.teacher, student, world.seen).lists(many))
    for column, expected in zip((0, 2), weights(student[1].tolist(), top, 10.0), strict=True):
        counts = torch.bincount(sets.items[:, column], minlength=13)[top].numpy()
        likely = np.array(expected) / sum(expected) * n
        often = likely > 5  # the other items have the smallest weight
        assert often.sum() in (2, 4)
        assert counts[~often].sum() < 5
        share = likely[often] / likely[often].sum() * counts[often].sum()
        assert scipy.stats.chisquare(counts[often], share).pvalue > 1e-3


def test_the_head_is_in_the_order_of_the_draw() -> None:
    # A student that ranks the whole top-P equally wrong: all orders are equally likely.
    world = make_world(1, 12, [])
    top = world.lists().teacher_top(3).tolist()[0]
    student = torch.zeros(2, 13)
    student[1, top] = torch.tensor([-3.0, -4.0, -5.0])
    loss = DCDPortLoss(
        DCDPortSettings(dcd_port_items=3, dcd_port_pool=3, dcd_port_temperature=1e-3)
    )
    many = torch.ones(6000, dtype=torch.int64)
    heads = Counter(
        map(
            tuple,
            loss.select(World(world.teacher, student, world.seen).lists(many))
            .items[:, :3]
            .tolist(),
        )
    )
    assert {tuple(sorted(head)) for head in heads} == {tuple(sorted(top))}
    assert len(heads) == 6
    assert scipy.stats.chisquare(list(heads.values())).pvalue > 1e-3


def test_no_weight_is_0() -> None:
    # A student in the teacher's order: the whole pool is drawn for both, each item with the
    # smallest weight.
    world = make_world(pairs=[])
    agreed = World(world.teacher, world.teacher.score_all(torch.arange(7)), world.seen)
    sets = DCDPortLoss(DCDPortSettings(dcd_port_items=4, dcd_port_pool=4)).select(agreed.lists())
    top = agreed.lists().teacher_top(4).sort(1).values
    assert torch.equal(sets.items[:, :4].sort(1).values, top)
    assert torch.equal(sets.items[:, 4:].sort(1).values, top)


def test_what_a_user_lacks_is_masked() -> None:
    # 30 items: user 1 has seen all but 3.
    world = make_world(2, 30, [(1, i) for i in range(1, 28)])
    sets = DCDPortLoss(DCDPortSettings(dcd_port_items=4, dcd_port_pool=9)).select(world.lists())
    assert sets.keep is not None
    assert torch.equal(sets.keep, sets.items != 0)
    assert sets.keep[:, :4].tolist() == [[True, True, True, False], [True] * 4]
    assert sets.keep[:, 4:].tolist() == [[True, True, True, False], [True] * 4]


def test_the_items_come_out_of_the_pool() -> None:
    with pytest.raises(
        SettingsError, match=r"\[dcd_port_items\]=60 is larger than \[dcd_port_pool\]=50"
    ):
        DCDPortSettings(dcd_port_items=60, dcd_port_pool=50)


def test_a_mask_is_required() -> None:
    with pytest.raises(ValueError, match="keep"):
        DCDPortLoss(DCDPortSettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))
