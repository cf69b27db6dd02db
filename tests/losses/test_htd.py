from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses import FTDLoss, HTDLoss, htd
from recbole_rcekd.losses.ftd import FTDSettings
from recbole_rcekd.losses.htd import HTDSettings, among_groups, within_groups
from tests.reference import htd as slow

WIDTHS = (3, 5)


def build(seed: int = 0, **settings: Any) -> HTDLoss:
    loss = HTDLoss(HTDSettings(**settings))
    torch.manual_seed(seed)
    loss.build(*WIDTHS, Seen.nothing(1, 1), torch.Generator().manual_seed(seed))
    return loss.double()


def vectors(m: int, n: int | None = None, seed: int = 0) -> Vectors:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(m, d, generator=draw, dtype=torch.float64) for d in WIDTHS)
    weights = torch.full((m if n is None else n,), 0.5, dtype=torch.float64)
    return Vectors(torch.arange(1, m + 1), student.requires_grad_(), teacher, weights)


def angles(*degrees: float) -> Tensor:
    """Vectors of length 1 in these directions."""
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_within_groups_by_hand() -> None:
    # 0° and 60° are alike (½), 0° and 120° are not (−½), 60° and 120° are (½). The last one is in a
    # group of its own.
    teacher, student = angles(0, 60, 120, 0), angles(0, 90, 90, 45)
    groups = torch.tensor([3, 3, 3, 1])
    expected = 2 * (1 / 2 - 0) ** 2 + 2 * (1 / 2 - 1) ** 2
    assert within_groups(student, teacher, groups).item() == pytest.approx(expected, abs=1e-15)


def test_among_groups_by_hand() -> None:
    # The mean of the group of two is at 45° for the teacher, at 0° for the student; that of the
    # group of one is its member.
    teacher, student = angles(0, 90, 180), torch.cat([angles(0, 0), angles(90)])
    groups = torch.tensor([0, 0, 5])
    to_two = 2 * (math.sqrt(1 / 2) - 1) ** 2 + (-math.sqrt(1 / 2) - 0) ** 2
    to_one = (-1 - 0) ** 2 + (0 - 0) ** 2 + (1 - 1) ** 2
    assert among_groups(student, teacher, groups).item() == pytest.approx(
        to_two + to_one, abs=1e-12
    )


@pytest.mark.parametrize("pairs", [1, 20, 10**9])
@pytest.mark.parametrize("n_groups", [1, 3, 40])
def test_topology_equals_the_slow_version(
    monkeypatch: pytest.MonkeyPatch, pairs: int, n_groups: int
) -> None:
    monkeypatch.setattr(htd, "_PAIRS", pairs)
    rows = vectors(15)
    groups = torch.randint(n_groups, (15,), generator=torch.Generator().manual_seed(1))
    plain = (rows.student.tolist(), rows.teacher.tolist(), groups.tolist())
    found = within_groups(rows.student, rows.teacher, groups)
    assert found.item() == pytest.approx(slow.within_groups(*plain), abs=1e-10)
    assert among_groups(rows.student, rows.teacher, groups).item() == pytest.approx(
        slow.among_groups(*plain), abs=1e-10
    )
    assert torch.autograd.gradcheck(
        lambda x: 2.0 * within_groups(x, rows.teacher, groups), rows.student
    )


def test_no_gradient_goes_through_a_mean() -> None:
    rows = vectors(6)
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    (found,) = torch.autograd.grad(among_groups(rows.student, rows.teacher, groups), rows.student)
    unit = torch.nn.functional.normalize
    means = [
        torch.stack([x[groups == g].mean(0) for g in range(3)]).detach()
        for x in (rows.student, rows.teacher)
    ]
    ours, theirs = (
        unit(x) @ unit(m).t() for x, m in zip((rows.student, rows.teacher), means, strict=True)
    )
    (expected,) = torch.autograd.grad((theirs - ours).square().sum(), rows.student)
    torch.testing.assert_close(found, expected)


def test_groups_are_those_of_the_gates_and_of_one_side() -> None:
    loss = build(htd_groups=4)
    rows = vectors(50)
    of_users, of_items = (loss.groups(side, rows.teacher) for side in ("users", "items"))
    gates: Any = loss.assignment.gates
    assert torch.equal(of_users, gates["of_users"](rows.teacher).argmax(1))
    assert torch.equal(of_items, gates["of_items"](rows.teacher).argmax(1) + 4)
    assert len(torch.unique(of_users)) > 1
    assert not of_users.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equals_the_slow_version(alpha: float) -> None:
    loss = build(htd_groups=3, htd_alpha=alpha)
    users, items = vectors(6, n=5, seed=1), vectors(9, seed=2)
    choices: list[tuple[Vectors | None, Vectors | None]] = [
        (users, items),
        (users, None),
        (None, items),
    ]
    start = loss.assignment.generator.get_state()
    for progress in (0.0, 0.1, 1.0):
        loss.begin_epoch(progress)
        for sides in choices:
            loss.assignment.generator.set_state(start)
            found = loss.forward(*sides)
            loss.assignment.generator.set_state(start)
            assert found.item() == pytest.approx(slow.value(*sides, loss), rel=1e-10)


def test_in_one_group_and_all_alike_it_is_ftd() -> None:
    # The teacher's embeddings have positive entries, so every pair is alike. One side, one group,
    # without the cosines to means.
    rows = vectors(12)
    teacher = rows.teacher.abs()
    found = within_groups(rows.student, teacher, torch.zeros(12, dtype=torch.int64))
    ftd = FTDLoss(FTDSettings()).forward(
        Vectors(rows.ids, rows.student, teacher, rows.weights), None
    )
    torch.testing.assert_close(found, ftd)
    gradients = [torch.autograd.grad(value, rows.student)[0] for value in (found, ftd)]
    torch.testing.assert_close(*gradients)


def test_experts_and_gates_learn_from_de_only() -> None:
    # α = 1: only the student learns, from the topology; α = 0: experts and gates learn too.
    for alpha in (1.0, 0.0):
        loss = build(htd_groups=3, htd_alpha=alpha)
        users = vectors(8)
        loss.forward(users, vectors(5)).backward()  # type: ignore[no-untyped-call]
        assert users.student.grad is not None
        assert users.student.grad.any()
        moved = {bool(part.grad is not None and part.grad.any()) for part in loss.parameters()}
        assert moved == {alpha == 0.0}


def test_temperature_and_sides_reach_the_assignment() -> None:
    loss = build(htd_sides="items")
    loss.begin_epoch(0.3)
    assert loss.assignment.temperature == pytest.approx(1e-3)
    assert loss.assignment.sides == ("items",)
    assert {name.split(".")[2] for name in loss.state_dict()} == {"of_items"}
