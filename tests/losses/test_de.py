from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.de import DELoss, DESettings, Experts
from tests.reference.de import shares


def built(width: int, teacher_width: int, seed: int = 0, **settings: Any) -> DELoss:
    loss = DELoss(DESettings(**settings))
    loss.build(width, teacher_width, Seen.nothing(1, 1), torch.Generator().manual_seed(seed))
    return loss.double()


def vectors(student: Tensor, teacher: Tensor) -> Vectors:
    ones = torch.ones(len(student), dtype=torch.float64)
    return Vectors(torch.arange(1, len(student) + 1), student.double(), teacher.double(), ones)


def with_certain_gate(loss: DELoss, side: str, expert: int) -> None:
    """Let α be 1 for one expert, whatever the noise."""
    gate: Any = loss.gates[f"of_{side}"]
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.full_like(gate.bias, -1e4))
        gate.bias[expert] = 1e4


def test_by_hand() -> None:
    loss = built(1, 1, de_experts=2)
    for side, factors in (("users", [2.0, 9.0]), ("items", [9.0, 3.0])):
        experts: Any = loss.experts[f"of_{side}"]
        with torch.no_grad():
            experts.first.weight.copy_(torch.ones(2, 1))
            experts.first.bias.zero_()
            experts.second.copy_(torch.tensor([factors]).t())
            experts.bias.copy_(torch.tensor([[1.0], [-1.0]]))
    with_certain_gate(loss, "users", 0)
    with_certain_gate(loss, "items", 1)
    # 2·4 + 1 = 9 for 10; ReLU(−4) leaves the bias 1 for 3.
    users = vectors(torch.tensor([[4.0], [-4.0]]), torch.tensor([[10.0], [3.0]]))
    # 3·2 − 1 = 5 for 8.
    items = vectors(torch.tensor([[2.0]]), torch.tensor([[8.0]]))
    assert loss.forward(users, items).item() == pytest.approx(1 + 4 + 9, abs=1e-9)


def test_experts_are_networks_side_by_side() -> None:
    experts = Experts(3, 2, 4).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    hidden = (2 + 4) // 2
    for k in range(3):
        network: Any = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 4)).double()
        own = slice(k * hidden, (k + 1) * hidden)
        with torch.no_grad():
            network[0].weight.copy_(experts.first.weight[own])
            network[0].bias.copy_(experts.first.bias[own])
            network[2].weight.copy_(experts.second[own].t())
            network[2].bias.copy_(experts.bias[k])
        alone = torch.zeros(5, 3, dtype=torch.float64)
        alone[:, k] = 1.0
        torch.testing.assert_close(experts(x, alone), network(x))
    mixture = torch.rand(5, 3, dtype=torch.float64)
    parts = [experts(x, mixture * torch.eye(3, dtype=torch.float64)[k]) for k in range(3)]
    torch.testing.assert_close(experts(x, mixture), sum(parts[1:], parts[0]))


def test_experts_begin_as_networks_do() -> None:
    experts = Experts(50, 16, 48)
    hidden = 32
    assert float(experts.second.detach().abs().max()) <= hidden**-0.5
    like = nn.Linear(hidden, 48)
    assert float(experts.second.detach().std()) == pytest.approx(
        float(like.weight.detach().std()), rel=0.05
    )
    assert float(experts.first.weight.detach().abs().max()) <= 16**-0.5


def test_how_often_an_expert_is_drawn() -> None:
    """As often as α says, within five standard deviations of a share of 20,000."""
    loss = built(1, 1, de_experts=3)
    wanted = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for progress in (1.0, 0.35):
        loss.begin_epoch(progress)
        drawn = loss._shares((wanted.log() + 5.0).expand(20_000, 3))
        assert ((drawn.mean(0) - wanted).abs() < 5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()


def test_shares_that_change_nothing_cost_no_expert() -> None:
    """At T = 0.03 only one or two of thirty experts are within T·36 of the best, in float64."""
    loss = built(1, 1, de_experts=30)
    loss.begin_epoch(0.15)
    drawn = loss._shares(torch.zeros(2_000, 30, dtype=torch.float64))
    torch.testing.assert_close(
        drawn.sum(1), torch.ones(2_000, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert (drawn > 0).sum(1).double().mean() < 6
    loss.begin_epoch(0.0)
    assert (loss._shares(torch.zeros(2_000, 30, dtype=torch.float64)) > 0).all()


def test_the_temperature_falls_from_1_to_nearly_0() -> None:
    loss = built(1, 1)
    found = []
    for epoch in range(11):
        loss.begin_epoch(epoch / 10)
        found.append(loss.temperature)
    assert found == pytest.approx([10.0**-epoch for epoch in range(11)])


@pytest.mark.parametrize("temperature", [1.0, 0.2, 1.1e-4, 0.9e-4, 1e-10])
def test_shares_against_the_slow_version(temperature: float) -> None:
    logits = torch.randn(50, 4, dtype=torch.float64)
    loss = built(1, 1, seed=3)
    loss.temperature = temperature
    found = loss._shares(logits)
    noise = torch.empty(50, 4, dtype=torch.float64).exponential_(
        generator=torch.Generator().manual_seed(3)
    )
    for row in range(50):
        assert found[row].tolist() == pytest.approx(
            shares(logits[row].tolist(), noise[row].tolist(), temperature)
        )
    assert loss._shares(logits.float()).isfinite().all()
    if temperature < 1e-3:
        assert ((found == 0) | (found == 1)).all(1).all()


def test_shares_are_learned_while_they_are_shares() -> None:
    loss = built(2, 3, de_experts=4)
    users = vectors(torch.randn(6, 2), torch.randn(6, 3))
    for progress, learned in ((0.0, True), (1.0, False)):
        loss.begin_epoch(progress)
        loss.zero_grad()
        torch.autograd.backward(loss.forward(users, None))
        gate: Any = loss.gates["of_users"]
        experts: Any = loss.experts["of_users"]
        assert (gate.weight.grad is not None and bool(gate.weight.grad.any())) is learned
        assert experts.second.grad.any()
        assert experts.second.grad.isfinite().all()


def test_a_draw_for_each_vector_and_each_step() -> None:
    loss = built(1, 1)
    loss.begin_epoch(1.0)
    first, second = (loss._shares(torch.zeros(200, 5)).argmax(1) for _ in range(2))
    assert len(set(first.tolist())) == 5
    assert not torch.equal(first, second)
