from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import Vectors
from recbole_rcekd.losses import FTDLoss
from recbole_rcekd.losses.ftd import FTDSettings
from tests.reference.ftd import ftd, value

LOSS = FTDLoss(FTDSettings())


def vectors(student: Tensor, teacher: Tensor, n: int | None = None) -> Vectors:
    return Vectors(
        torch.arange(1, len(student) + 1),
        student,
        teacher,
        torch.ones(len(student) if n is None else n),
    )


def random_vectors(m: int, n: int | None = None, seed: int = 0) -> Vectors:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(m, d, generator=draw, dtype=torch.float64) for d in (3, 5))
    return vectors(student.requires_grad_(), teacher, n)


def angles(*degrees: float) -> Tensor:
    """Vectors in these directions, of different lengths."""
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1) * torch.arange(
        1, len(degrees) + 1
    ).unsqueeze(1)


def test_by_hand() -> None:
    # Teacher: 90° between the two users, cosine 0. Student: 60°, ½. Two ordered pairs.
    found = LOSS.forward(vectors(angles(0, 60), angles(0, 90)), None)
    assert found.item() == pytest.approx(2 * (0 - 1 / 2) ** 2, abs=1e-15)
    # A user and an item, 120° for the teacher and 60° for the student.
    found = LOSS.forward(vectors(angles(0), angles(0)), vectors(angles(60), angles(120)))
    assert found.item() == pytest.approx(2 * (-1 / 2 - 1 / 2) ** 2, abs=1e-15)


@pytest.mark.parametrize(("n_users", "n_items"), [(4, 6), (1, 9), (0, 5), (20, 0), (0, 0)])
def test_equals_the_slow_version_in_value_and_gradient(n_users: int, n_items: int) -> None:
    users, items = random_vectors(n_users, seed=1), random_vectors(n_items, seed=2)
    found = LOSS.forward(users, items)
    assert found.shape == ()
    assert found.item() == pytest.approx(value(users, items, LOSS), abs=1e-10)
    student, teacher = (
        torch.nn.functional.normalize(torch.cat(both))
        for both in ((users.student, items.student), (users.teacher, items.teacher))
    )
    pairs = (teacher @ teacher.t() - student @ student.t()).square().sum()
    for side in (users, items):
        by_pairs, ours = (
            torch.autograd.grad(v, side.student, retain_graph=True)[0] for v in (pairs, found)
        )
        torch.testing.assert_close(ours, by_pairs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("which", [0, 1])
def test_one_side(which: int) -> None:
    side = random_vectors(7)
    both: list[Vectors | None] = [None, None]
    both[which] = side
    assert LOSS.forward(*both).item() == pytest.approx(
        ftd(side.student.tolist(), side.teacher.tolist()), abs=1e-10
    )


def test_rows_beyond_the_batch_do_not_count() -> None:
    long, short = random_vectors(9, n=4), random_vectors(9)
    short = vectors(short.student[:4], short.teacher[:4])
    assert torch.equal(LOSS.forward(long, None), LOSS.forward(short, None))


def test_rotated_and_stretched_tables_are_the_same() -> None:
    # Only angles count: a student that is the teacher rotated, with rows of other lengths, has
    # nothing to learn.
    teacher = torch.randn(12, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    student = (teacher @ turn * torch.rand(12, 1, dtype=torch.float64)).requires_grad_()
    found = LOSS.forward(vectors(student[:5], teacher[:5]), vectors(student[5:], teacher[5:]))
    assert abs(found.item()) < 1e-12
    assert torch.autograd.grad(found, student)[0].abs().max() < 1e-10


def test_float32_is_near_enough() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3000, 8, generator=draw), torch.randn(3000, 64, generator=draw)
    exact = LOSS.forward(vectors(student.double(), teacher.double()), None)
    assert LOSS.forward(vectors(student, teacher), None).item() == pytest.approx(
        exact.item(), rel=1e-5
    )


def test_an_embedding_of_zeros_has_no_angle() -> None:
    student, teacher = angles(0, 60, 0), angles(0, 90, 30)
    student[2] = 0.0
    student.requires_grad_()
    found = LOSS.forward(vectors(student, teacher), None)
    assert found.item() == pytest.approx(ftd(student.tolist(), teacher.tolist()), abs=1e-12)
    assert torch.autograd.grad(found, student)[0].isfinite().all()
    teacher[0] = 0.0
    found = LOSS.forward(vectors(student, teacher), None)
    assert found.item() == pytest.approx(ftd(student.tolist(), teacher.tolist()), abs=1e-12)


def test_sides() -> None:
    assert LOSS.sides == ("users", "items")
    assert FTDLoss(FTDSettings(ftd_sides="items")).sides == ("items",)
    assert LOSS.weight == 0.001
