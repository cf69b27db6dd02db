from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.fce import FCELoss, FCESettings
from tests.reference.fce import fce
from tests.tables import make_world

LN3 = math.log(3)


def test_by_hand() -> None:
    # Three items with student probabilities 1/5, 3/5, 1/5; the padding score counts nowhere.
    student = torch.tensor([[99.0, 0.0, LN3, 0.0]], dtype=torch.float64)
    # The teacher gives items 1 and 2 the probabilities 1/4 and 3/4.
    sets = ItemSets(torch.tensor([[2, 1]]), torch.tensor([[LN3, 0.0]], dtype=torch.float64))
    value = FCELoss(FCESettings()).forward(student, sets)
    assert value.item() == pytest.approx(3 / 4 * math.log(5 / 3) + 1 / 4 * math.log(5), abs=1e-12)
    # All items as targets, with equal probabilities.
    sets = ItemSets(
        torch.zeros(1, 0).long(), torch.tensor([[-torch.inf, 7.0, 7.0, 7.0]], dtype=torch.float64)
    )
    value = FCELoss(FCESettings(fce_target="all")).forward(student, sets)
    assert value.item() == pytest.approx(1 / 3 * math.log(5 / 3) + 2 / 3 * math.log(5), abs=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_equals_the_slow_version(tau: float) -> None:
    student, teacher = (
        torch.randn(10, 15, dtype=torch.float64) * 2,
        torch.randn(10, 15, dtype=torch.float64) * 2,
    )
    items = teacher[:, 1:].topk(4).indices + 1
    some = FCELoss(FCESettings(fce_temperature=tau)).forward(
        student, ItemSets(items, teacher.gather(1, items))
    )
    every = FCELoss(FCESettings(fce_temperature=tau, fce_target="all")).forward(
        student, ItemSets(items[:, :0], teacher)
    )
    for row in range(10):
        s, t = student[row].tolist(), teacher[row].tolist()
        assert some[row].item() == pytest.approx(fce(s, t, items[row].tolist(), tau), abs=1e-10)
        assert every[row].item() == pytest.approx(fce(s, t, range(1, 15), tau), abs=1e-10)


def test_a_top_k_of_all_items_is_the_other_mode() -> None:
    world = make_world()
    short = FCELoss(FCESettings(fce_top_k=30))
    sets = short.select(world.lists())
    full = FCELoss(FCESettings(fce_target="all"))
    everything = ItemSets(
        full.select(world.lists()).items, world.teacher.score_all(torch.arange(1, 7))
    )
    torch.testing.assert_close(
        short.forward(world.student[1:], sets),
        full.forward(world.student[1:], everything),
        atol=1e-5,
        rtol=1e-5,
    )


def test_selection() -> None:
    world = make_world()
    teacher, full = FCELoss(FCESettings(fce_top_k=4)), FCELoss(FCESettings(fce_target="all"))
    assert torch.equal(teacher.select(world.lists()).items, world.lists().teacher_top(4))
    assert full.select(world.lists()).items.shape == (6, 0)
    assert (teacher.scores_all_items, full.scores_all_items) == (True, True)
    assert (teacher.teaches_all_items, full.teaches_all_items) == (False, True)
    assert not teacher.renewed


def test_it_bounds_ndcg_of_the_teachers_top_k_without_closure() -> None:
    # P5: −ln NDCG_{Q_T} ≤ loss, with the items' ranks among all items; ties count against them.
    student = torch.randn(200, 21, dtype=torch.float64) * torch.logspace(
        -2, 2, 200, dtype=torch.float64
    ).unsqueeze(1)
    teacher = torch.randn(200, 21, dtype=torch.float64) * 2
    items = teacher[:, 1:].topk(5).indices + 1
    loss = FCELoss(FCESettings()).forward(student, ItemSets(items, teacher.gather(1, items)))
    for row in range(200):
        q = teacher[row, items[row]].softmax(0).tolist()
        ranks = [1 + int((student[row, 1:] > student[row, i]).sum()) for i in items[row]]
        dcg = sum(gain / math.log2(1 + rank) for gain, rank in zip(q, ranks, strict=True))
        ideal = sum(gain / math.log2(2 + k) for k, gain in enumerate(sorted(q, reverse=True)))
        assert loss[row].item() >= -math.log(dcg / ideal) - 1e-12


# --- an estimated normaliser ----------------------------------------------------------------------


def sampled(**settings: Any) -> FCELoss:
    return FCELoss(FCESettings(fce_normaliser="sampled", **settings))


def test_the_estimate_by_hand() -> None:
    # Target item 1 (odds 2), the student's item 2 (odds 3), a tail of two (odds 1 and 1/2) for ten:
    # 2 + 3 + 10/2 · 3/2.
    scores = torch.tensor([[math.log(2), LN3, 0.0, -math.log(2)]], dtype=torch.float64)
    sets = ItemSets(
        torch.tensor([[1, 2, 3, 4]]),
        torch.tensor([[7.0, -torch.inf, -torch.inf, -torch.inf]], dtype=torch.float64),
        keep=torch.ones(1, 4, dtype=torch.bool),
        log_tail=torch.tensor([math.log(10 / 2)], dtype=torch.float64),
    )
    value = sampled(fce_samples=2).forward(scores, sets)
    assert value.item() == pytest.approx(math.log((2 + 3 + 5 * 3 / 2) / 2), abs=1e-12)


def test_the_sets_of_an_estimate() -> None:
    world, loss = make_world(), sampled(fce_top_k=4, fce_samples=7)
    sets = loss.select(world.lists())
    assert (loss.renewed, loss.scores_all_items, loss.teaches_all_items) == (True, False, False)
    assert sets.items.shape == (6, 4 + 4 + 7)
    assert sets.teacher_scores is not None
    assert sets.log_tail is not None
    for row in range(6):
        q_t, q_s, items = (
            x[row].tolist()
            for x in (world.lists().teacher_top(4), world.lists().student_top(4), sets.items)
        )
        assert items[:8] == q_t + [0 if item in q_t else item for item in q_s]
        certain = {*q_t, *q_s}
        assert len({*items[8:]} - certain - {0}) == 7
        assert sets.log_tail[row].item() == pytest.approx(
            math.log((30 - len(certain)) / 7), abs=1e-6
        )
    assert torch.equal(sets.teacher_scores != -torch.inf, torch.arange(15).expand(6, -1) < 4)


@pytest.mark.parametrize("n", [26, 40])
def test_with_all_of_the_rest_in_the_tail_nothing_is_estimated(n: int) -> None:
    world, whole = make_world(), FCELoss(FCESettings(fce_top_k=4, fce_temperature=0.7))
    loss = sampled(fce_top_k=4, fce_temperature=0.7, fce_samples=n)
    sets, student = loss.select(world.lists()), world.student[1:]
    assert not torch.as_tensor(sets.log_tail).any()
    exact = whole.forward(student, whole.select(world.lists()))
    torch.testing.assert_close(
        loss.forward(student.gather(1, sets.items), sets), exact, rtol=1e-5, atol=1e-5
    )


def test_the_estimated_sum_is_unbiased_and_its_logarithm_is_low() -> None:
    world, loss, n = make_world(), sampled(fce_top_k=2, fce_samples=3), 4000
    whole = FCELoss(FCESettings(fce_top_k=2))
    for user in (1, 4):
        candidates = world.lists(torch.full((n,), user))
        sets, student = loss.select(candidates), world.student[user].double().expand(n, -1)
        exact = whole.forward(student, whole.select(candidates))
        # loss = log Z − a sum over the targets, which is the same in both.
        surplus = loss.forward(student.gather(1, sets.items), sets) - exact
        ratio = surplus.exp()
        assert ratio.std() > 0.05
        assert abs(ratio.mean() - 1).item() < 4 * ratio.std().item() / n**0.5
        assert surplus.mean() < 0


def test_without_the_weight_of_the_tail_the_loss_would_be_too_low() -> None:
    world, loss = make_world(), sampled(fce_top_k=2, fce_samples=3)
    sets = loss.select(world.lists())
    scores = world.student[1:].gather(1, sets.items)
    unweighted = dataclasses.replace(sets, log_tail=torch.zeros(6))
    assert (loss.forward(scores, unweighted) < loss.forward(scores, sets)).all()


def test_an_estimate_for_all_targets_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"\[fce_normaliser\] is 'sampled', but .* set fce_target to 'teacher'"
    ):
        FCESettings(fce_target="all", fce_normaliser="sampled")


def test_scores_of_the_teacher_are_required() -> None:
    with pytest.raises(ValueError, match="teacher_scores"):
        FCELoss(FCESettings()).forward(torch.zeros(1, 2), ItemSets(torch.ones(1, 1).long()))
    with pytest.raises(ValueError, match="log_tail"):
        sampled().forward(torch.zeros(1, 2), ItemSets(torch.ones(1, 2).long(), torch.zeros(1, 2)))
