from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.lambdaloss import LambdaLossLoss, LambdaLossSettings
from tests.reference.lambdaloss import lambdaloss
from tests.tables import make_world

LN3 = math.log(3)


def value(pool: list[int], targets: list[int], teacher: list[float], student: Tensor) -> Tensor:
    items = torch.tensor([pool + targets])
    scores = torch.tensor([[-torch.inf] * len(pool) + teacher], dtype=torch.float64)
    loss = LambdaLossLoss(LambdaLossSettings(lambdaloss_top_k=len(targets)))
    return loss.forward(student[items], ItemSets(items, scores))


def test_by_hand() -> None:
    # Gains 3/4 and 1/4 of items 1 and 2. The student's top-2 is 3, 1, so the items 1, 2 and 3 have
    # the ranks 2, 3 and 1.
    student = torch.tensor([9.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    d1, d2, d3 = 1.0, 1 / math.log2(3), 1 / 2
    ideal = 3 / 4 * d1 + 1 / 4 * d2
    expected = (
        (3 / 4 - 1 / 4) * (d2 - d3) * math.log(1 + math.exp(-1.0 - 0.5))
        + 3 / 4 * (d1 - d2) * math.log(1 + math.exp(2.0 - 0.5))
        + 1 / 4 * (d1 - d3) * math.log(1 + math.exp(2.0 + 1.0))
    ) / ideal
    assert value([3, 1], [1, 2], [LN3, 0.0], student).item() == pytest.approx(expected, abs=1e-12)
    # A single target, and an empty column of the student's top-M.
    one = (d1 - d2) * math.log(1 + math.exp(2.0 - 0.5))
    assert value([3, 1], [1, 0], [LN3, 0.0], student).item() == pytest.approx(one, abs=1e-12)
    assert value([3, 1, 0], [1, 0], [LN3, 0.0], student).item() == pytest.approx(one, abs=1e-12)
    assert value([3, 1], [0, 0], [0.0, 0.0], student).item() == 0.0


def test_equals_the_slow_version() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(10, 15, dtype=torch.float64, generator=draw) * 2 for _ in range(2)
    )
    for row in range(10):
        q_t, pool = (
            table[row, 1:].topk(n).indices.add(1).tolist()
            for table, n in ((teacher, 4), (student, 6))
        )
        found = value(pool, q_t, teacher[row, q_t].tolist(), student[row])
        expected = lambdaloss(student[row].tolist(), teacher[row].tolist(), q_t, pool, 1.0)
        assert found.item() == pytest.approx(expected, abs=1e-10)


def test_a_pair_weighs_what_its_swap_changes_in_ndcg() -> None:
    # All five items are in the student's top-M, three of them are targets. log(1 + e^x) = x for the
    # one pair that is far apart.
    ranking, gain = [4, 2, 5, 1, 3], {1: 0.5, 2: 0.3, 3: 0.2}
    ideal = sum(g / math.log2(2 + k) for k, g in enumerate(gain.values()))

    def ndcg(order: list[int]) -> float:
        return sum(gain.get(item, 0.0) / math.log2(2 + k) for k, item in enumerate(order)) / ideal

    teacher = [math.log(gain[item]) for item in (1, 2, 3)]
    for i, j in itertools.permutations(ranking, 2):
        if gain.get(i, 0.0) <= gain.get(j, 0.0):
            continue
        swapped = [{i: j, j: i}.get(item, item) for item in ranking]
        # The gradient of the loss by s_i is −Σ_j w_ij σ(s_j − s_i): it is −w_ij with j far above i
        # and all others far below i.
        scores = torch.full((6,), -200.0, dtype=torch.float64)
        scores[i], scores[j] = 0.0, 200.0
        table = scores.requires_grad_()
        (slope,) = torch.autograd.grad(value(ranking, [1, 2, 3], teacher, table).sum(), table)
        above = sum(  # items of more gain, which are far below i
            (gain[k] - gain[i])
            * abs(1 / math.log2(2 + ranking.index(k)) - 1 / math.log2(2 + ranking.index(i)))
            / ideal
            for k in gain
            if k not in (i, j) and gain[k] > gain.get(i, 0.0)
        )
        assert -slope[i].item() + above == pytest.approx(
            abs(ndcg(swapped) - ndcg(ranking)), abs=1e-9
        ), (i, j)


def test_a_student_in_the_teachers_order_with_wide_gaps_has_nothing_to_learn() -> None:
    student = torch.tensor([0.0, 300.0, 200.0, 100.0, 0.0], dtype=torch.float64)
    assert value([1, 2, 3, 4], [1, 2, 3], [2.0, 1.0, 0.0], student).item() < 1e-40
    assert value([1, 2, 3, 4], [4, 3, 2], [2.0, 1.0, 0.0], student).item() > 10


def test_selection() -> None:
    world = make_world()
    loss = LambdaLossLoss(LambdaLossSettings(lambdaloss_top_k=4, lambdaloss_pool=7))
    sets = loss.select(world.lists())
    assert torch.equal(
        sets.items, torch.cat([world.lists().student_top(7), world.lists().teacher_top(4)], dim=1)
    )
    assert LambdaLossSettings(lambdaloss_top_k=9, lambdaloss_pool=7).longest_list() == (
        "lambdaloss_top_k",
    )
    assert LambdaLossSettings(lambdaloss_top_k=4, lambdaloss_pool=7).longest_list() == (
        "lambdaloss_pool",
    )


def test_scores_of_the_teacher_are_required() -> None:
    with pytest.raises(ValueError, match="teacher_scores"):
        LambdaLossLoss(LambdaLossSettings()).forward(
            torch.zeros(1, 30), ItemSets(torch.ones(1, 30).long())
        )
