from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.functional import soft_cross_entropy
from recbole_rcekd.core.types import ItemSets, Seen, Vectors
from recbole_rcekd.losses import tarec as module
from recbole_rcekd.losses.tarec import TARecContrast, TARecLoss, TARecSettings
from tests.reference.tarec import contrast, tarec
from tests.tables import Table, make_world, seen_of

LN = math.log


def loss_of(
    probabilities: list[float], teacher: list[float], **settings: Any
) -> tuple[float, list[float]]:
    """The loss of one row in the teacher's order, and its gradient by the student's scores."""
    student = torch.tensor(
        [[LN(p) for p in probabilities]], dtype=torch.float64, requires_grad=True
    )
    scores = torch.tensor([[LN(q) for q in teacher]], dtype=torch.float64)
    sets = ItemSets(
        torch.ones(student.shape).long(), scores, torch.ones(student.shape, dtype=torch.bool)
    )
    value = TARecLoss(TARecSettings(**settings)).forward(student, sets).sum()
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient[0].tolist()


def test_two_items_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/4, 3/4): half of the probability is one position too far down.
    value, gradient = loss_of([1 / 4, 3 / 4], [3 / 4, 1 / 4])
    assert value == pytest.approx(1 / 2, abs=1e-12)
    # d|F_T − F_S| = −dp_1 = −p_1 (1 − p_1) by s_1, and the opposite by s_2.
    assert gradient == pytest.approx([-1 / 4 * 3 / 4, 1 / 4 * 3 / 4], abs=1e-12)
    assert loss_of([3 / 4, 1 / 4], [3 / 4, 1 / 4])[0] == pytest.approx(0, abs=1e-12)


def test_three_items_by_hand() -> None:
    # F_T = 1/2, 3/4, 1; F_S = 1/4, 1/2, 1.
    value, gradient = loss_of([1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4])
    assert value == pytest.approx(1 / 4 + 1 / 4, abs=1e-12)
    # −(2 p_1 + p_2) falls by 2, 1 and 0 per probability; their mean under p is 3/4.
    slopes = [1 / 4 * (-2 + 3 / 4), 1 / 4 * (-1 + 3 / 4), 1 / 2 * (0 + 3 / 4)]
    assert gradient == pytest.approx(slopes, abs=1e-12)
    # The same amount two positions away costs twice as much as one position away; cross-entropy
    # would not tell them apart.
    near, far = (
        loss_of([3 / 8, 3 / 8, 1 / 4], [1 / 2, 1 / 4, 1 / 4]),
        loss_of([3 / 8, 1 / 4, 3 / 8], [1 / 2, 1 / 4, 1 / 4]),
    )
    assert near[0] == pytest.approx(1 / 8, abs=1e-12)
    assert far[0] == pytest.approx(2 / 8, abs=1e-12)


def test_temperature_divides_both_sides_and_nothing_else() -> None:
    # The softmax at τ = 2 of logarithms of squares is that of their roots.
    value, _ = loss_of([1 / 16, 9 / 16], [9 / 16, 1 / 16], tarec_temperature=2.0)
    assert value == pytest.approx(1 / 2, abs=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_equals_the_slow_version(tau: float) -> None:
    world = make_world(8, 25, seed=3)
    student, teacher = (
        world.student.double(),
        Table(world.teacher.score_all(torch.arange(9)).double(), world.seen),
    )
    candidates = world.lists()
    candidates._teacher = teacher
    loss = TARecLoss(TARecSettings(tarec_top_k=6, tarec_temperature=tau))
    sets = loss.select(candidates)
    found = loss.forward(student[1:].gather(1, sets.items), sets)
    for user in range(1, 9):
        tops = [
            sorted(range(1, 26), key=lambda i: -float(scores[user, i]))[:6]
            for scores in (teacher.scores, student)
        ]
        items = sorted({*tops[0], *tops[1]}, key=lambda i: -float(teacher.scores[user, i]))
        expected = tarec(student[user].tolist(), teacher.scores[user].tolist(), items, tau)
        assert found[user - 1].item() == pytest.approx(expected, abs=1e-10)


def test_equals_the_slow_version_under_any_mask() -> None:
    student, teacher = (
        torch.randn(40, 9, dtype=torch.float64) * 3,
        torch.randn(40, 9, dtype=torch.float64) * 3,
    )
    keep = torch.rand(40, 9) < 0.6
    keep[0] = False
    found = TARecLoss(TARecSettings()).forward(
        student, ItemSets(torch.ones(40, 9).long(), teacher, keep)
    )
    assert found[0] == 0
    for row in range(1, 40):
        kept = keep[row].nonzero().squeeze(1).tolist()
        expected = tarec(student[row].tolist(), teacher[row].tolist(), kept, 1.0)
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


def select(teacher: list[float], student: list[float], k: int) -> ItemSets:
    """The sets of one user, from the scores of items 1, 2, …"""
    n = len(teacher)
    world = make_world(1, n)._replace(
        student=torch.tensor([[-torch.inf] + [0.0] * n, [-torch.inf, *student]])
    )
    candidates = world.lists()
    candidates._teacher = Table(
        torch.tensor([[0.0] * (n + 1), [0.0, *teacher]]), seen_of([], 2, n + 1)
    )
    return TARecLoss(TARecSettings(tarec_top_k=k)).select(candidates)


def test_selection_by_hand() -> None:
    # Q_T = {2, 1}, Q_S = {4, 2}: in the teacher's order, item 2 once, and an empty column last.
    sets = select([3.0, 4.0, 1.0, 2.0], [1.0, 2.0, 0.0, 3.0], 2)
    assert sets.keep is not None
    assert sets.items.tolist() == [[2, 1, 4, 0]]
    assert sets.keep.tolist() == [[True, True, True, False]]
    # Q_S = {6, 3}, which the teacher scores alike.
    assert select(
        [9.0, 8.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 4.0, 0.0, 0.0, 5.0], 2
    ).items.tolist() == [[1, 2, 6, 3]]


def test_at_most_the_length_of_the_list() -> None:
    far_off = torch.tensor([[1e4, -1e4, -1e4, -1e4], [-1e4, -1e4, -1e4, 1e4]])
    sets = ItemSets(torch.ones(2, 4).long(), far_off.flip(0), torch.ones(2, 4, dtype=torch.bool))
    assert TARecLoss(TARecSettings()).forward(far_off, sets).tolist() == [3, 3]


def test_less_than_cross_entropy_where_it_is_nearly_right() -> None:
    # Pinsker: |F_T − F_S| ≤ √(KL/2) at each position.
    student, teacher = torch.randn(2, 50, 6, dtype=torch.float64)
    sets = ItemSets(torch.ones(50, 6).long(), teacher, torch.ones(50, 6, dtype=torch.bool))
    divergence = soft_cross_entropy(student, teacher) - soft_cross_entropy(teacher, teacher)
    assert (TARecLoss(TARecSettings()).forward(student, sets) <= 5 * (divergence / 2).sqrt()).all()


def test_scores_of_the_teacher_are_required() -> None:
    with pytest.raises(ValueError, match="teacher_scores"):
        TARecLoss(TARecSettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))


# --- the contrast of embeddings -------------------------------------------------------------------


def contrast_of(
    sides: str = "both", widths: tuple[int, int] = (3, 5), **settings: Any
) -> TARecContrast:
    torch.manual_seed(1)
    loss = TARecContrast(TARecSettings(tarec_sides=sides, **settings))  # type: ignore[arg-type]
    loss.build(*widths, Seen.nothing(2, 2), torch.Generator().manual_seed(2))
    return loss.double()


def vectors(n: int, weight: float = 1.0) -> Vectors:
    student, teacher = (
        torch.randn(n, 3, dtype=torch.float64),
        torch.randn(n, 5, dtype=torch.float64),
    )
    return Vectors(
        torch.arange(1, n + 1), student.requires_grad_(), teacher, torch.full((n,), weight)
    )


def plain(x: Any) -> Any:
    return x.detach().tolist()


def test_without_weight_there_is_no_contrast() -> None:
    for weight in (0.3, 0.0):
        side = TARecLoss(TARecSettings(tarec_contrast_weight=weight)).embedding_side()
        assert (side is None) if weight == 0.0 else (side is not None and side[1] == weight)
    assert TARecContrast.left_out_by == "tarec_contrast_weight: 0"


def test_two_embeddings_by_hand() -> None:
    # W = 1. The cosine to the own embedding is 1, to the other's 0, at τ = 1: −ln(e/(e + 1)). The
    # lengths do not count.
    loss = contrast_of("items", (2, 2), tarec_contrast_temperature=1.0)
    loss.projections["of_items"].weight.data = torch.eye(2, dtype=torch.float64)
    table = torch.tensor([[2.0, 0.0], [0.0, 7.0]], dtype=torch.float64)
    given = Vectors(torch.tensor([1, 2]), 3 * table, table, torch.tensor([1.0, 0.5]))
    assert loss.forward(None, given).item() == pytest.approx(1.5 * LN(1 + math.exp(-1)), abs=1e-12)


def test_the_contrast_equals_the_slow_version() -> None:
    loss = contrast_of()
    users, items = vectors(6), vectors(9, 0.5)
    items.weights[4] = 1.0
    expected = math.fsum(
        contrast(
            plain(v.student),
            plain(v.teacher),
            plain(loss.projections[f"of_{side}"].weight),
            plain(v.weights),
            0.2,
        )
        for side, v in (("users", users), ("items", items))
    )
    assert loss.forward(users, items).item() == pytest.approx(expected, abs=1e-10)
    alone = contrast_of("users")
    assert set(alone.projections) == {"of_users"}
    assert torch.isfinite(alone.forward(users, None))


def test_gradients_of_the_contrast() -> None:
    loss = contrast_of()
    users, items = vectors(4), vectors(5, 0.5)
    given = (users.student, items.student)
    assert torch.autograd.gradcheck(
        lambda a, b: loss.forward(_with(users, a), _with(items, b)), given
    )
    users.teacher.requires_grad_()
    loss.forward(users, items).backward()  # type: ignore[no-untyped-call]
    assert users.teacher.grad is None
    for parameter in loss.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def _with(given: Vectors, student: Tensor) -> Vectors:
    return Vectors(given.ids, student, given.teacher, given.weights)


def test_an_empty_batch_and_embeddings_of_zeros() -> None:
    loss = contrast_of()
    assert loss.forward(vectors(0), vectors(0)).item() == 0
    one = vectors(1)
    # There is no other embedding to contrast it with.
    assert loss.forward(one, vectors(0)).item() == pytest.approx(0, abs=1e-12)
    zero = Vectors(
        one.ids,
        torch.zeros(1, 3, dtype=torch.float64),
        torch.zeros(1, 5, dtype=torch.float64),
        one.weights,
    )
    assert loss.forward(zero, vectors(3)).isfinite()


def test_many_embeddings_are_contrasted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONTRASTED_AT_A_TIME", 4)
    given = vectors(10)
    parts = contrast_of("users")._parts(10, torch.device("cpu"))
    assert [len(part) for part in parts] == [4, 3, 3]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert torch.cat(parts).tolist() != list(range(10))
    loss = contrast_of("users")
    expected = math.fsum(
        contrast(
            plain(given.student[part]),
            plain(given.teacher[part]),
            plain(loss.projections["of_users"].weight),
            [1.0] * len(part),
            0.2,
        )
        for part in parts
    )
    assert loss.forward(given, None).item() == pytest.approx(
        expected, abs=1e-10
    )  # from the same seed
