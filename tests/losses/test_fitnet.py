from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.fitnet import FitNetLoss, FitNetSettings


def built(width: int, teacher_width: int, **settings: Any) -> FitNetLoss:
    loss = FitNetLoss(FitNetSettings(**settings))
    loss.build(width, teacher_width, Seen.nothing(1, 1), torch.Generator())
    return loss.double()


def rows(student: list[list[float]], teacher: list[list[float]], weights: list[float]) -> Vectors:
    ids = torch.arange(1, len(weights) + 1)
    double: list[Tensor] = [
        torch.tensor(values, dtype=torch.float64) for values in (student, teacher, weights)
    ]
    return Vectors(ids, *double)


def set_to(layer: Any, weight: list[list[float]], bias: list[float]) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))


def test_by_hand() -> None:
    loss = built(1, 2)
    set_to(loss.projectors["of_users"], [[2.0], [0.0]], [0.0, 1.0])
    set_to(loss.projectors["of_items"], [[1.0], [1.0]], [0.0, 0.0])
    # 3 → (6, 1), wanted (5, 3): 1² + 2².
    users = rows([[3.0]], [[5.0, 3.0]], [1.0])
    # 1 → (1, 1), wanted (0, 3): 1² + 2², counted half; 2 → (2, 2), wanted (2, 0): 2².
    items = rows([[1.0], [2.0]], [[0.0, 3.0], [2.0, 0.0]], [0.5, 1.0])
    assert loss.forward(users, items).item() == (1 + 4) + (1 + 4) / 2 + 4
    assert loss.forward(users, None).item() == 5
    assert loss.forward(None, items).item() == 6.5


def test_a_hidden_layer_by_hand() -> None:
    loss = built(1, 3, fitnet_projector="mlp", fitnet_sides="users")
    first, _, second = loss.projectors["of_users"].children()
    assert first.weight.shape == ((1 + 3) // 2, 1)
    set_to(first, [[1.0], [-1.0]], [0.0, 1.0])
    set_to(second, [[1.0, 5.0], [0.0, 5.0], [2.0, 5.0]], [0.0, 0.0, 1.0])
    # 2 → (2, −1) → (2, 0) → (2, 0, 5), wanted 0: 4 + 25.
    assert loss.forward(rows([[2.0]], [[0.0, 0.0, 0.0]], [1.0]), None).item() == 29


def test_at_length_1_only_the_angle_counts() -> None:
    loss = built(2, 2, fitnet_normalise=True, fitnet_sides="items")
    set_to(loss.projectors["of_items"], [[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    # The angle between (1, 1) and (1, 0) is 45°: 2·(1 − cos) = 2 − √2, whatever the lengths.
    for long in (1.0, 1e-3, 1e3):
        items = rows([[long, long]], [[7.0 / long, 0.0]], [1.0])
        assert loss.forward(None, items).item() == pytest.approx(2 - math.sqrt(2), abs=1e-12)


def test_a_linear_projector_of_the_teacher_itself_can_be_learned() -> None:
    loss = built(3, 3, fitnet_sides="users")
    student = torch.randn(20, 3, dtype=torch.float64)
    turned = student @ torch.randn(3, 3, dtype=torch.float64) + 1.0
    users = Vectors(torch.arange(1, 21), student, turned, torch.ones(20, dtype=torch.float64))
    learner = torch.optim.LBFGS(loss.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        learner.zero_grad()
        value = loss.forward(users, None)
        torch.autograd.backward(value)
        return value

    learner.step(closure)  # type: ignore[no-untyped-call]
    assert loss.forward(users, None).item() < 1e-8


def test_a_projector_for_each_side_that_is_distilled() -> None:
    assert set(built(2, 3).projectors) == {"of_users", "of_items"}
    only = built(2, 3, fitnet_sides="items")
    assert isinstance(only.projectors["of_items"], nn.Linear)
    assert set(only.projectors) == {"of_items"}
