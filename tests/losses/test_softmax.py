from __future__ import annotations

import math

import pytest
import torch

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.fce import FCELoss, FCESettings
from recbole_rcekd.losses.softmax import SoftmaxLoss, SoftmaxSettings
from tests.reference.softmax import softmax
from tests.tables import make_world

LN3 = math.log(3)


def test_by_hand() -> None:
    # Three items with probabilities 1/5, 3/5, 1/5; the padding score never counts.
    student = torch.tensor([[99.0, 0.0, LN3, 0.0]], dtype=torch.float64)
    loss = SoftmaxLoss(SoftmaxSettings())
    for items, expected in (
        ([2], math.log(5 / 3)),
        ([2, 0, 0], math.log(5 / 3)),
        ([1, 2], 1 / 2 * math.log(5) + 1 / 2 * math.log(5 / 3)),
        ([1, 2, 0], 1 / 2 * math.log(5) + 1 / 2 * math.log(5 / 3)),
        ([0, 0], 0.0),
    ):
        assert loss.forward(student, ItemSets(torch.tensor([items]))).item() == pytest.approx(
            expected, abs=1e-12
        )
    # Halved scores: odds 1 : √3 : 1.
    cooler = SoftmaxLoss(SoftmaxSettings(softmax_temperature=2.0))
    value = cooler.forward(student, ItemSets(torch.tensor([[2]])))
    assert value.item() == pytest.approx(math.log((2 + 3**0.5) / 3**0.5), abs=1e-12)


def test_equals_the_slow_version_and_fce_with_an_indifferent_teacher() -> None:
    student = (
        torch.randn(10, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    )
    items = student[:, 1:].topk(4).indices + 1
    found = SoftmaxLoss(SoftmaxSettings()).forward(student, ItemSets(items))
    for row in range(10):
        assert found[row].item() == pytest.approx(
            softmax(student[row].tolist(), items[row].tolist(), 1.0), abs=1e-10
        )
    taught = FCELoss(FCESettings()).forward(
        student, ItemSets(items, torch.zeros(10, 4, dtype=torch.float64))
    )
    torch.testing.assert_close(found, taught)


def test_a_user_without_training_items_learns_nothing() -> None:
    student = torch.randn(2, 9, requires_grad=True)
    loss = SoftmaxLoss(SoftmaxSettings()).forward(student, ItemSets(torch.tensor([[0, 0], [4, 0]])))
    torch.autograd.backward(loss.sum())
    assert loss[0] == 0
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1].any()


def test_positives_are_training_items_drawn_at_random() -> None:
    world, loss = make_world(), SoftmaxLoss(SoftmaxSettings(softmax_positives=2))
    drawn = [
        set(loss.select(world.lists(torch.tensor([5]), seed)).items[0].tolist())
        for seed in range(50)
    ]
    assert set(map(frozenset, drawn)) == {frozenset(pair) for pair in ((5, 10), (5, 15), (10, 15))}
    all_of_them = (
        SoftmaxLoss(SoftmaxSettings(softmax_positives=5))
        .select(world.lists(torch.tensor([5])))
        .items[0]
    )
    assert sorted(all_of_them.tolist()) == [0, 0, 5, 10, 15]


def test_it_replaces_the_models_own_loss() -> None:
    assert (SoftmaxLoss.needs_teacher, SoftmaxLoss.replaces_base) == (False, True)
    with pytest.raises(SettingsError, match=r"\[softmax_weight\] is 0.0, but must be above 0"):
        SoftmaxSettings(softmax_weight=0.0)
