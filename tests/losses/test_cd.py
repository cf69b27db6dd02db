from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.cd import CDLoss, CDSettings
from tests.reference.cd import cd, duel_probabilities
from tests.tables import Golden, make_world

LN3 = math.log(3)


def test_by_hand() -> None:
    # Teacher score 2·ln 3 with t1 = 2: label σ(ln 3) = 3/4. Student score 0: probability 1/2, ln 2
    # for any label.
    sets = ItemSets(torch.tensor([[4]]), torch.tensor([[2 * LN3]], dtype=torch.float64))
    loss = CDLoss(CDSettings())
    assert loss.forward(torch.zeros(1, 1, dtype=torch.float64), sets).item() == pytest.approx(
        math.log(2), abs=1e-12
    )
    # Student probability 1/4.
    value = loss.forward(torch.tensor([[-LN3]], dtype=torch.float64), sets)
    assert value.item() == pytest.approx(3 / 4 * math.log(4) + 1 / 4 * math.log(4 / 3), abs=1e-12)
    # t2 moves the score before t1 divides it: (−3 + 3) / 2 is a label of 1/2.
    even = ItemSets(torch.tensor([[4]]), torch.tensor([[-3.0]], dtype=torch.float64))
    value = CDLoss(CDSettings(cd_label_shift=3.0)).forward(
        torch.tensor([[LN3]], dtype=torch.float64), even
    )
    assert value.item() == pytest.approx(1 / 2 * math.log(4 / 3) + 1 / 2 * math.log(4), abs=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (0.7, 0.5), (5.0, -1.0)])
def test_equals_the_slow_version_under_any_mask(scale: float, shift: float) -> None:
    student, teacher = (
        torch.randn(30, 8, dtype=torch.float64) * 3,
        torch.randn(30, 8, dtype=torch.float64) * 3,
    )
    keep = torch.rand(30, 8) < 0.6
    loss = CDLoss(CDSettings(cd_label_scale=scale, cd_label_shift=shift))
    for mask in (keep, None):
        found = loss.forward(student, ItemSets(torch.ones(30, 8).long(), teacher, mask))
        for row in range(30):
            items = keep[row].nonzero().squeeze(1).tolist() if mask is not None else list(range(8))
            expected = cd(student[row].tolist(), teacher[row].tolist(), items, scale, shift)
            assert found[row].item() == pytest.approx(expected, abs=1e-10)


def test_authors_numbers(golden: Golden) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, class CD; 1e-7 because of the 1e-10 inside
    # their logarithm
    settings = golden.meta["cd_"]
    loss = CDLoss(
        CDSettings(
            cd_items=settings["cd_n_distill"],
            cd_pool=settings["cd_sample_num"],
            cd_label_scale=settings["cd_t1"],
            cd_label_shift=settings["cd_t2"],
        )
    )
    users = golden.batch()
    items, candidates = golden.ids("cd_items")[users], golden.lists(users)
    pool = candidates.student_top(settings["cd_sample_num"], unseen=True)
    assert (items.unsqueeze(2) == pool.unsqueeze(1)).any(2).all()
    golden.check(
        "cd_", "loss_sum", loss, users, ItemSets(items, candidates.teacher_scores(items)), 1e-7
    )


def test_gradient_is_probability_minus_label() -> None:
    student, teacher = (
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(4, 5, dtype=torch.float64),
    )
    student.requires_grad_()
    value = CDLoss(CDSettings(cd_label_scale=1.0)).forward(
        student, ItemSets(torch.ones(4, 5).long(), teacher)
    )
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, student.detach().sigmoid() - teacher.sigmoid())


@pytest.mark.parametrize("guide", ["student", "teacher"])
def test_items_are_distinct_unseen_and_from_the_guides_pool(guide: str) -> None:
    world = make_world()
    loss = CDLoss(CDSettings(cd_items=6, cd_pool=9, cd_guide=guide))  # type: ignore[arg-type]
    sets = loss.select(world.lists())
    candidates = world.lists()
    pool = (
        candidates.student_top(9, unseen=True)
        if guide == "student"
        else candidates.teacher_top(9, unseen=True)
    )
    assert sets.keep is not None
    assert sets.keep.all()
    for row in range(6):
        chosen = sets.items[row].tolist()
        assert len(set(chosen)) == 6
        assert set(chosen) <= set(pool[row].tolist())
        assert not {row + 1, 2 * (row + 1), 3 * (row + 1)} & set(chosen)


@pytest.mark.parametrize("guide", ["student", "teacher"])
def test_no_shortage_while_unseen_items_are_left(guide: str) -> None:
    # 30 items: user 1 has seen all but 3, user 2 all but 6, user 3 none. 5 are drawn from a pool of
    # all unseen items.
    pairs = [(1, i) for i in range(1, 28)] + [(2, i) for i in range(1, 25)]
    loss = CDLoss(CDSettings(cd_items=5, cd_guide=guide))  # type: ignore[arg-type]
    sets = loss.select(make_world(3, 30, pairs).lists())
    assert sets.keep is not None
    assert sets.keep.sum(1).tolist() == [3, 5, 5]
    assert sorted(sets.items[0].tolist()) == [0, 0, 28, 29, 30]
    assert torch.equal(sets.items != 0, sets.keep)


def test_each_item_is_the_better_of_two_drawn_positions() -> None:
    # One item per user, from a pool of 6: how often each position wins (χ², 5 degrees of freedom).
    n = 6000
    world = make_world(n, 8, pairs=[])
    sets = CDLoss(CDSettings(cd_items=1, cd_pool=6, cd_sampling_temperature=0.5)).select(
        world.lists()
    )
    place = (world.lists().student_top(6) == sets.items).nonzero()[:, 1]
    counts = torch.bincount(place, minlength=6).numpy()
    expected = np.array(duel_probabilities(6, 6, 0.5)) * n
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    uniform = np.full(6, n / 6)
    assert scipy.stats.chisquare(counts, uniform).pvalue < 1e-9


def test_a_new_draw_follows_the_generator() -> None:
    world, loss = make_world(), CDLoss(CDSettings(cd_items=6, cd_pool=20))
    assert torch.equal(
        loss.select(world.lists(seed=1)).items, loss.select(world.lists(seed=1)).items
    )
    assert not torch.equal(
        loss.select(world.lists(seed=1)).items, loss.select(world.lists(seed=2)).items
    )


def test_scores_of_the_teacher_are_required() -> None:
    with pytest.raises(ValueError, match="teacher_scores"):
        CDLoss(CDSettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))
