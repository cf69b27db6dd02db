from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.vkd import VkDLoss, VkDSettings


def built(width: int, teacher_width: int, **settings: Any) -> VkDLoss:
    loss = VkDLoss(VkDSettings(**settings))
    loss.build(width, teacher_width, Seen.nothing(1, 1), torch.Generator())
    return loss.double()


def vectors(student: Tensor, teacher: Tensor) -> Vectors:
    return Vectors(
        torch.arange(1, len(student) + 1),
        student,
        teacher,
        torch.ones(len(student), dtype=torch.float64),
    )


def test_by_hand() -> None:
    loss = built(1, 2)
    with torch.no_grad():
        loss.projector.copy_(torch.tensor([[30.0], [40.0]]))  # of length 1: (0.6, 0.8)
    users = vectors(
        torch.tensor([[5.0]]).double(), torch.tensor([[3.0, 5.0]]).double()
    )  # 5 → (3, 4)
    items = vectors(
        torch.tensor([[10.0]]).double(), torch.tensor([[4.0, 8.0]]).double()
    )  # 10 → (6, 8)
    assert loss.forward(users, items).item() == pytest.approx(1 + 4, abs=1e-12)


def test_standardised_by_hand() -> None:
    # Both dimensions: mean 2, deviation 1, so −1 and 1; a third that does not vary is 0.
    teacher = torch.tensor([[1.0, 3.0, 7.0], [3.0, 1.0, 7.0]], dtype=torch.float64)
    users = vectors(torch.zeros(2, 2, dtype=torch.float64), teacher)
    loss = built(2, 3, vkd_standardise=True, vkd_sides="users")
    assert loss.forward(users, None).item() == pytest.approx(4 * 1.0, rel=1e-5)


@pytest.mark.parametrize(("width", "teacher_width"), [(3, 7), (4, 4), (7, 3)])
def test_the_projector_is_orthonormal_whatever_is_learned(width: int, teacher_width: int) -> None:
    loss = built(width, teacher_width)
    # Weight decay shrinks what is learned, and must not shrink the projector.
    learner = torch.optim.Adam(loss.parameters(), lr=0.1, weight_decay=0.1)
    users = vectors(torch.randn(9, width).double(), torch.randn(9, teacher_width).double())
    before = loss.orthonormal().detach()
    values = []
    for _ in range(20):
        learner.zero_grad()
        value = loss.forward(users, None)
        torch.autograd.backward(value)
        learner.step()
        values.append(value.item())
        matrix = loss.orthonormal().detach()
        shared = matrix.t() @ matrix if width <= teacher_width else matrix @ matrix.t()
        torch.testing.assert_close(
            shared, torch.eye(min(width, teacher_width), dtype=torch.float64)
        )
    assert values[-1] < values[0]
    assert (matrix - before).abs().max() > 0.1


def test_a_narrow_student_keeps_its_products() -> None:
    loss = built(3, 7)
    student = torch.randn(6, 3, dtype=torch.float64)
    turned = student @ loss.orthonormal().t()
    torch.testing.assert_close(turned @ turned.t(), student @ student.t())


def test_it_does_not_jump() -> None:
    """The signs of a QR decomposition flip where the corner of the matrix passes 0."""
    loss = built(2, 3)
    found = []
    for corner in (-1e-9, 1e-9):
        with torch.no_grad():
            loss.projector[0, 0] = corner
        found.append(loss.orthonormal().detach())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "teacher_width"), [(2, 4), (4, 2)])
def test_gradients(width: int, teacher_width: int) -> None:
    loss = built(width, teacher_width)
    student = torch.randn(5, width, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, teacher_width, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, _: loss.forward(vectors(s, teacher), None), (student, loss.projector)
    )


def test_one_projector_for_both_sides_brings_scores_along() -> None:
    """A teacher whose embeddings lie in as many dimensions as the student's is learned entirely."""
    turn = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0]
    teacher = [torch.randn(n, 3, dtype=torch.float64) @ turn.t() for n in (8, 9)]
    student = [torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (8, 9)]
    loss = built(3, 5)
    learner = torch.optim.LBFGS(
        [*student, loss.projector], max_iter=500, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        learner.zero_grad()
        value = loss.forward(*(vectors(s, t) for s, t in zip(student, teacher, strict=True)))
        torch.autograd.backward(value)
        return value

    learner.step(closure)  # type: ignore[no-untyped-call]
    users, items = (each.detach() for each in student)
    torch.testing.assert_close(users @ items.t(), teacher[0] @ teacher[1].t(), atol=1e-3, rtol=0)
