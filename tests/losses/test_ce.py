from __future__ import annotations

import math

import pytest
import torch

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.ce import CELoss, CESettings
from recbole_rcekd.losses.fce import FCELoss, FCESettings
from recbole_rcekd.losses.rce import RCELoss, RCESettings
from tests.reference.ce import ce, soft_ce
from tests.tables import Golden, Table, make_world, seen_of

LN2, LN3 = math.log(2), math.log(3)


def test_two_items_by_hand() -> None:
    # Teacher: 3/4 and 1/4. Student: 1/2 and 1/2, which costs ln 2 with any teacher.
    sets = ItemSets(torch.tensor([[5, 7]]), torch.tensor([[LN3, 0.0]], dtype=torch.float64))
    loss = CELoss(CESettings())
    indifferent = loss.forward(torch.zeros(1, 2, dtype=torch.float64), sets)
    assert indifferent.item() == pytest.approx(LN2, abs=1e-12)
    # Student: 1/4 and 3/4: 3/4·ln 4 + 1/4·ln(4/3).
    wrong = loss.forward(torch.tensor([[0.0, LN3]], dtype=torch.float64), sets)
    assert wrong.item() == pytest.approx(3 / 4 * math.log(4) + 1 / 4 * math.log(4 / 3), abs=1e-12)


def test_temperature_divides_both_sides_and_nothing_else() -> None:
    # Scores 2·ln 3 at τ = 2 are ln 3: teacher and student are both (3/4, 1/4), so the loss is its
    # entropy; no τ² factor.
    scores = torch.tensor([[2 * LN3, 0.0]], dtype=torch.float64)
    value = CELoss(CESettings(ce_temperature=2.0)).forward(
        scores, ItemSets(torch.tensor([[1, 2]]), scores)
    )
    assert value.item() == pytest.approx(3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4), abs=1e-12)


def test_union_by_hand() -> None:
    # Q_T = {1, 2}, Q_S = {2, 3}; the union has three items, each counted once.
    teacher = Table(torch.tensor([[0.0] * 5, [0.0, 4.0, 3.0, 1.0, 0.0]]), seen_of([], 2, 5))
    world = make_world(1, 4)._replace(
        student=torch.tensor([[-torch.inf] + [0.0] * 4, [-torch.inf, 0.0, 2.0, 2.0, -1]])
    )
    candidates = world.lists()
    candidates._teacher = teacher
    sets = CELoss(CESettings(ce_items="union", ce_top_k=2)).select(candidates)
    assert sets.keep is not None
    assert sorted(sets.items[sets.keep].tolist()) == [1, 2, 3]
    assert sets.overlap is not None
    assert sets.overlap.tolist() == [1 / 2]


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("which", ["teacher", "student", "union"])
def test_equals_the_slow_version(which: str, tau: float) -> None:
    world = make_world(8, 25, seed=3)
    student = world.student.double()
    teacher = Table(world.teacher.score_all(torch.arange(9)).double(), world.seen)
    candidates = world.lists()
    candidates._teacher = teacher
    settings = CESettings(ce_items=which, ce_top_k=6, ce_temperature=tau)  # type: ignore[arg-type]
    loss = CELoss(settings)
    sets = loss.select(candidates)
    found = loss.forward(student[1:].gather(1, sets.items), sets)
    for user in range(1, 9):
        q_t = sorted(range(1, 26), key=lambda i: -float(teacher.scores[user, i]))[:6]
        q_s = sorted(range(1, 26), key=lambda i: -float(student[user, i]))[:6]
        expected = ce(student[user].tolist(), teacher.scores[user].tolist(), q_t, q_s, which, tau)
        assert found[user - 1].item() == pytest.approx(expected, abs=1e-10)


def test_equals_the_slow_version_under_any_mask() -> None:
    student, teacher = (
        torch.randn(40, 9, dtype=torch.float64) * 3,
        torch.randn(40, 9, dtype=torch.float64) * 3,
    )
    keep = torch.rand(40, 9) < 0.6
    keep[0] = False
    sets = ItemSets(torch.arange(1, 10).expand(40, 9), teacher, keep)
    found = CELoss(CESettings(ce_temperature=1.3)).forward(student, sets)
    for row in range(40):
        kept = keep[row].nonzero().squeeze(1).tolist()
        expected = soft_ce(student[row].tolist(), teacher[row].tolist(), kept, 1.3)
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_authors_numbers(golden: Golden, which: str) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, class KD
    prefix = f"ce_{which}_"
    settings = golden.meta[prefix]
    loss = CELoss(
        CESettings(
            ce_top_k=settings["kd_K"],
            ce_temperature=settings["kd_tau"],
            ce_items=which,  # type: ignore[arg-type]
        )
    )
    users = golden.batch()
    sets = loss.select(golden.lists(users))
    assert torch.equal(sets.items, golden.ids(f"{prefix}top")[users])
    golden.check(prefix, "loss_sum", loss, users, sets, 1e-10)


def test_the_students_top_k_is_the_first_term_of_rce() -> None:
    world = make_world()
    ce_loss = CELoss(CESettings(ce_top_k=5, ce_items="student"))
    rce_loss = RCELoss(RCESettings(rce_top_k=5, rce_samples=4, rce_pool=10, rce_terms="l1"))
    values = []
    for loss in (ce_loss, rce_loss):
        sets = loss.select(world.lists())
        values.append(loss.forward(world.student[1:].gather(1, sets.items), sets))
    assert torch.equal(*values)


def test_a_top_k_of_all_items_is_fce_in_value_and_gradient() -> None:
    world = make_world()
    settings = CESettings(ce_top_k=30, ce_temperature=1.5)
    student = world.student[1:].clone().requires_grad_()
    sets = CELoss(settings).select(world.lists())
    short = CELoss(settings).forward(student.gather(1, sets.items), sets)
    everything = ItemSets(sets.items[:, :0], world.teacher.score_all(torch.arange(1, 7)))
    full = FCELoss(FCESettings(fce_target="all", fce_temperature=1.5)).forward(student, everything)
    torch.testing.assert_close(short, full)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (short, full)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_the_loss_is_least_when_the_student_agrees() -> None:
    teacher = torch.randn(5, 8, dtype=torch.float64)
    sets = ItemSets(torch.ones(5, 8, dtype=torch.int64), teacher)
    student = teacher.clone().requires_grad_()
    value = CELoss(CESettings()).forward(student, sets)
    torch.testing.assert_close(
        value.detach(), -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1)
    )
    assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-15


def test_at_a_high_temperature_only_differences_are_learned() -> None:
    # τ → ∞: ℓ → ln K, and τ²·∇ℓ → ((s − s̄) − (t − t̄)) / K.
    student, teacher = (
        torch.randn(3, 6, dtype=torch.float64),
        torch.randn(3, 6, dtype=torch.float64),
    )
    student.requires_grad_()
    tau = 1e4
    value = CELoss(CESettings(ce_temperature=tau)).forward(
        student, ItemSets(torch.ones(3, 6).long(), teacher)
    )
    torch.testing.assert_close(
        value.detach(), torch.full((3,), math.log(6), dtype=torch.float64), atol=1e-7, rtol=0
    )
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    gradient = torch.autograd.grad(value.sum(), student)[0]
    torch.testing.assert_close(gradient * tau**2, centred.detach() / 6, atol=1e-3, rtol=0)


def test_only_the_teachers_top_k_is_chosen_once() -> None:
    renewed = {
        which: CELoss(CESettings(ce_items=which)).renewed
        for which in ("teacher", "student", "union")
    }
    assert renewed == {"teacher": False, "student": True, "union": True}


def test_scores_of_the_teacher_are_required() -> None:
    with pytest.raises(ValueError, match="teacher_scores"):
        CELoss(CESettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))
