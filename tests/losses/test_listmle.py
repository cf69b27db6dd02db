from __future__ import annotations

import itertools
import math

import pytest
import torch

from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.listmle import ListMLELoss, ListMLESettings
from recbole_rcekd.losses.rrd import RRDLoss, RRDSettings
from tests.reference.rrd import rrd
from tests.tables import make_world


def value(scores: list[list[float]], keep: list[list[bool]] | None = None) -> torch.Tensor:
    table = torch.tensor(scores, dtype=torch.float64)
    mask = torch.ones_like(table, dtype=torch.bool) if keep is None else torch.tensor(keep)
    return ListMLELoss(ListMLESettings()).forward(
        table, ItemSets(torch.ones_like(table).long(), keep=mask)
    )


def test_by_hand() -> None:
    # Odds 2 : 1 : 5, and the teacher's order is this one: 2/8 · 1/6 · 5/5.
    odds = [math.log(2), 0.0, math.log(5)]
    assert value([odds]).item() == pytest.approx(math.log(8 / 2) + math.log(6 / 1), abs=1e-12)
    # With two items only: 2/3 · 1/1.
    assert value([odds], [[True, True, False]]).item() == pytest.approx(math.log(3 / 2), abs=1e-12)


def test_equal_scores_make_all_orders_equally_likely() -> None:
    assert value([[3.0] * 5]).item() == pytest.approx(math.log(math.factorial(5)), abs=1e-12)


def test_the_probabilities_of_all_orders_sum_to_one() -> None:
    scores = [0.3, -1.0, 2.0, 0.5]
    losses = value([list(order) for order in itertools.permutations(scores)])
    assert (-losses).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert value([sorted(scores, reverse=True)]).item() == losses.min().item()


def test_equals_the_slow_version_and_rrd_far_above_its_rest() -> None:
    scores = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    found = value(scores.tolist())
    for row in range(10):
        assert found[row].item() == pytest.approx(
            rrd(scores[row].tolist(), range(6), []), abs=1e-10
        )
    sets = ItemSets(torch.ones(10, 8).long(), keep=torch.ones(10, 8, dtype=torch.bool))
    relaxed = RRDLoss(RRDSettings(rrd_top_k=6, rrd_rest=2))
    far_below = torch.cat([scores, torch.full((10, 2), -60.0, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(relaxed.forward(far_below, sets), found)


def test_the_items_are_the_teachers_top_k() -> None:
    world, loss = make_world(), ListMLELoss(ListMLESettings(listmle_top_k=7))
    assert torch.equal(loss.select(world.lists()).items, world.lists().teacher_top(7))
    assert not loss.renewed
