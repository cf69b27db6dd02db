from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.rd import RDLoss, RDSettings
from tests.reference.rd import rd
from tests.tables import Golden, make_world

LN2, LN3 = math.log(2), math.log(3)


def sets_of(keep: torch.Tensor, n_items: int, k: int, started: bool = True) -> ItemSets:
    """Item sets as from :meth:`RDLoss.select`, for a catalogue of so many items."""
    found = keep[:, k:].sum(1).clamp(min=1)
    gamma = torch.full((len(keep),), float(started), dtype=torch.float64)
    return ItemSets(
        torch.ones_like(keep).long(),
        keep=keep,
        gamma=gamma,
        log_tail=((n_items - 1) / found).double().log(),
    )


def test_by_hand() -> None:
    # Two items of weights e^0 and e^{−1}; scores 0 and ln 3 cost ln 2 and ln 4/3. Two samples with
    # scores 0.5 and 2, and 21 items.
    scores = torch.tensor([[0.0, LN3, 0.5, 2.0]], dtype=torch.float64)
    every = torch.ones(1, 4, dtype=torch.bool)
    first, second = 1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1))
    settings = RDSettings(rd_top_k=2, rd_samples=2)
    before = RDLoss(settings).forward(scores, sets_of(every, 21, 2, started=False))
    assert before.item() == pytest.approx(first * LN2 + second * math.log(4 / 3), abs=1e-12)
    # Both samples are above the first item, one is above the second: ranks 20·2/2 and 20·1/2, which
    # should be 0 and 1.
    w = (first * math.tanh(0.1 * 20), second * math.tanh(0.1 * 9))
    after = RDLoss(settings).forward(scores, sets_of(every, 21, 2))
    assert after.item() == pytest.approx(w[0] * LN2 + w[1] * math.log(4 / 3), abs=1e-12)
    # The port counts from 1 and makes the sum 1.
    w = (first * math.tanh(0.1 * 21), second * math.tanh(0.1 * 10))
    port = RDLoss(dataclasses.replace(settings, rd_weights="port")).forward(
        scores, sets_of(every, 21, 2)
    )
    assert port.item() == pytest.approx((w[0] * LN2 + w[1] * math.log(4 / 3)) / sum(w), abs=1e-12)


def test_items_that_the_student_ranks_high_enough_have_no_gradient() -> None:
    scores = torch.tensor([[5.0, 4.0, 1.0, 2.0]], requires_grad=True)
    sets = sets_of(torch.ones(1, 4, dtype=torch.bool), 21, 2)
    value = RDLoss(RDSettings(rd_top_k=2, rd_samples=2)).forward(scores, sets)
    assert value.item() == 0
    assert not torch.autograd.grad(value.sum(), scores)[0].any()


@pytest.mark.parametrize("port", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_equals_the_slow_version_under_any_mask(started: bool, port: bool) -> None:
    k, n = 5, 8
    student = torch.randn(60, k + n, dtype=torch.float64)
    keep = torch.rand(60, k + n) < 0.7
    keep[:, k] = True  # a sample at least
    loss = RDLoss(
        RDSettings(
            rd_top_k=k,
            rd_samples=n,
            rd_position_scale=3.0,
            rd_mu=0.05,
            rd_weights="port" if port else "original",
        )
    )
    found = loss.forward(student, sets_of(keep, 41, k, started))
    for row in range(60):
        head = [i for i in range(k) if keep[row, i]]
        tail = [i for i in range(k, k + n) if keep[row, i]]
        expected = rd(
            student[row].tolist(), head, tail, 41, scale=3.0, mu=0.05, started=started, port=port
        )
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


def test_whole_ranks_stay_whole_in_float32() -> None:
    # All n samples are above: rank N − 1, though (N − 1)/n is no whole number. With this μ a rank
    # that is one too low shows.
    loss = RDLoss(RDSettings(rd_top_k=1, rd_samples=7, rd_mu=1e-3))
    for n_items in range(9, 300):
        sets = sets_of(torch.ones(1, 8, dtype=torch.bool), n_items, 1)
        sets = dataclasses.replace(
            sets, log_tail=None if sets.log_tail is None else sets.log_tail.float()
        )
        scores = torch.tensor([[0.0, *[1.0] * 7]])
        expected = math.tanh(1e-3 * (n_items - 1)) * LN2
        assert loss.forward(scores, sets).item() == pytest.approx(expected, rel=1e-5), n_items


def test_authors_numbers(golden: Golden) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, class RD
    settings = golden.meta["rd_"]
    users = golden.batch()
    candidates = golden.lists(users)
    top = candidates.teacher_top(settings["rd_topk"], unseen=True)
    assert torch.equal(top, golden.ids("rd_teacher_top")[users])
    items = torch.cat([top, golden.ids("rd_dynamic")[users]], 1)
    sets = dataclasses.replace(
        sets_of(torch.ones_like(items, dtype=torch.bool), 60, top.shape[1]), items=items
    )
    loss = RDLoss(
        RDSettings(
            rd_top_k=settings["rd_topk"],
            rd_samples=settings["rd_dynamic_sample"],
            rd_position_scale=settings["rd_T"],
            rd_mu=settings["rd_mu"],
            rd_start_epoch=settings["rd_start_epoch"],
            rd_weights="port",
        )
    )
    golden.check("rd_", "loss_sum", loss, users, sets, 1e-10)


def test_selection() -> None:
    world = make_world()
    sets = RDLoss(RDSettings(rd_top_k=4, rd_samples=9)).select(world.lists())
    assert sets.keep is not None
    assert sets.keep.all()
    assert sets.log_tail is not None
    assert torch.equal(sets.items[:, :4], world.lists().teacher_top(4, unseen=True))
    torch.testing.assert_close(sets.log_tail.exp(), torch.full((6,), 29 / 9))
    for row, items in enumerate(sets.items.tolist()):
        assert not {0, row + 1, 2 * (row + 1), 3 * (row + 1)} & set(items[4:])
        assert len(set(items[4:])) == 9


def test_fewer_samples_stand_for_more_each() -> None:
    # 30 items: user 1 has seen all but 6, user 2 all but 3.
    world = make_world(2, 30, [(1, i) for i in range(1, 25)] + [(2, i) for i in range(1, 28)])
    sets = RDLoss(RDSettings(rd_top_k=4, rd_samples=9)).select(world.lists())
    assert sets.keep is not None
    assert sets.log_tail is not None
    assert sets.keep[:, :4].sum(1).tolist() == [4, 3]
    assert sets.keep[:, 4:].sum(1).tolist() == [6, 3]
    torch.testing.assert_close(sets.log_tail.exp(), torch.tensor([29 / 6, 29 / 3]))


def test_ranks_count_from_the_start_epoch_on() -> None:
    loss = RDLoss(RDSettings(rd_top_k=4, rd_samples=9, rd_start_epoch=3))
    for epoch, gamma in ((0, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)):
        candidates = make_world().lists()
        candidates.epoch = epoch
        found = loss.select(candidates).gamma
        assert found is not None
        assert found.tolist() == [gamma] * 6


def test_no_gradient_is_taken_of_the_weights() -> None:
    scores = torch.randn(20, 9, dtype=torch.float64, requires_grad=True)
    loss = RDLoss(RDSettings(rd_top_k=4, rd_samples=5))
    value = loss.forward(scores, sets_of(torch.ones(20, 9, dtype=torch.bool), 30, 4))
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert gradient[:, :4].any()
    assert not gradient[:, 4:].any()


def test_masks_are_required() -> None:
    with pytest.raises(ValueError, match="keep, gamma and log_tail"):
        RDLoss(RDSettings()).forward(torch.zeros(1, 1), ItemSets(torch.ones(1, 1).long()))
