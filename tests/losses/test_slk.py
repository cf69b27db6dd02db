from __future__ import annotations

import math

import pytest
import torch

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.fce import FCELoss, FCESettings
from recbole_rcekd.losses.slk import SLKLoss, SLKSettings
from tests.reference.slk import slk
from tests.tables import make_world

LN3 = math.log(3)


def sets_of(items: list[int], teacher: list[float]) -> ItemSets:
    """Targets, and the student's item at the border as the last column."""
    return ItemSets(
        torch.tensor([items]), torch.tensor([[*teacher, -torch.inf]], dtype=torch.float64)
    )


# Three items with student probabilities 1/5, 3/5, 1/5; the padding score counts nowhere.
STUDENT = torch.tensor([[99.0, 0.0, LN3, 0.0]], dtype=torch.float64)


def test_by_hand() -> None:
    # The teacher gives items 1 and 2 the probabilities 1/4 and 3/4. The border is item 2's score,
    # so the weights are σ(−ln 3) = 1/4 and 1/2.
    value = SLKLoss(SLKSettings()).forward(STUDENT, sets_of([2, 1, 2], [LN3, 0.0]))
    assert value.item() == pytest.approx(
        3 / 4 * 1 / 2 * math.log(5 / 3) + 1 / 4 * 1 / 4 * math.log(5), abs=1e-12
    )
    # A border twice as soft: odds 1 : √3.
    soft = SLKLoss(SLKSettings(slk_cut_temperature=2.0)).forward(
        STUDENT, sets_of([2, 1, 2], [LN3, 0.0])
    )
    weight = 1 / (1 + 3**0.5)
    assert soft.item() == pytest.approx(
        3 / 4 * 1 / 2 * math.log(5 / 3) + 1 / 4 * weight * math.log(5), abs=1e-12
    )


def test_equals_the_slow_version() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(10, 15, dtype=torch.float64, generator=draw) * 2 for _ in range(2)
    )
    items = teacher[:, 1:].topk(4).indices + 1
    border = student[:, 1:].topk(3).indices[:, -1:] + 1
    teacher_scores = torch.nn.functional.pad(teacher.gather(1, items), (0, 1), value=-torch.inf)
    loss = SLKLoss(SLKSettings(slk_temperature=1.5, slk_cut_temperature=0.7))
    found = loss.forward(student, ItemSets(torch.cat([items, border], dim=1), teacher_scores))
    for row in range(10):
        s, t = student[row].tolist(), teacher[row].tolist()
        expected = slk(s, t, items[row].tolist(), s[int(border[row])], 1.5, 0.7)
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


def test_the_weights_are_constants_in_the_gradient() -> None:
    # Σ q w (p − e): with (q w) = (1/4 · 1/4, 3/4 · 1/2) as by hand, 7/16 in all.
    scores = STUDENT.clone().requires_grad_()
    value = SLKLoss(SLKSettings()).forward(scores, sets_of([2, 1, 2], [LN3, 0.0]))
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    expected = [0.0, 7 / 16 * 1 / 5 - 1 / 16, 7 / 16 * 3 / 5 - 3 / 8, 7 / 16 * 1 / 5]
    torch.testing.assert_close(gradient, torch.tensor([expected], dtype=torch.float64))


def test_far_above_the_border_it_is_fce_and_far_below_nothing() -> None:
    sets, plain = (
        sets_of([2, 1, 3], [LN3, 0.0]),
        ItemSets(torch.tensor([[2, 1]]), torch.tensor([[LN3, 0.0]]).double()),
    )
    full = FCELoss(FCESettings()).forward(STUDENT, plain)
    sharp = SLKLoss(SLKSettings(slk_cut_temperature=1e-3))
    below = torch.tensor([[0.0, 0.0, LN3, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(
        sharp.forward(below, sets), FCELoss(FCESettings()).forward(below, plain)
    )
    above = torch.tensor([[0.0, 0.0, LN3, 5.0]], dtype=torch.float64)
    assert sharp.forward(above, sets).item() == 0.0
    # Fewer items than the cut: nothing lies below the border.
    torch.testing.assert_close(
        SLKLoss(SLKSettings()).forward(STUDENT, sets_of([2, 1, 0], [LN3, 0.0])), full
    )


def test_selection() -> None:
    world = make_world()
    sets = SLKLoss(SLKSettings(slk_top_k=4, slk_cut=7)).select(world.lists())
    assert torch.equal(sets.items[:, :4], world.lists().teacher_top(4))
    assert torch.equal(sets.items[:, 4], world.lists().student_top(7)[:, 6])
    beyond = SLKLoss(SLKSettings(slk_top_k=4, slk_cut=31)).select(world.lists())
    assert not beyond.items[:, 4].any()


def test_scores_of_the_teacher_are_required() -> None:
    with pytest.raises(ValueError, match="teacher_scores"):
        SLKLoss(SLKSettings()).forward(torch.zeros(1, 2), ItemSets(torch.ones(1, 2).long()))
