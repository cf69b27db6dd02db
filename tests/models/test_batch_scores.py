"""Both ways to hold a batch's scores, against dense arithmetic in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recbole_rcekd.core.types import Seen
from recbole_rcekd.models.batch_scores import BatchScores, DenseBatchScores, FactoredBatchScores

N, D, N_ITEMS = 5, 3, 12
ITEMS = torch.tensor([[1, 5, 5], [11, 2, 3], [4, 4, 9], [8, 1, 10], [7, 6, 11]])


def operands() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows, table = (torch.randn(n, D, generator=draw, dtype=torch.float64) for n in (N, N_ITEMS))
    table[0] = 100.0  # the padding item must not matter
    rows[:] = rows.abs()
    return rows.requires_grad_(), table.requires_grad_()


def full_rows(rows: Tensor, table: Tensor) -> BatchScores:
    return DenseBatchScores(rows @ table.t())


def with_product(rows: Tensor, table: Tensor) -> BatchScores:
    return FactoredBatchScores(rows, table, rows @ table.t())


WAYS = [full_rows, FactoredBatchScores, with_product]
every_way = pytest.mark.parametrize("way", WAYS, ids=["full rows", "products", "known product"])


@every_way
def test_cells_and_their_gradients(way: Any) -> None:
    rows, table = operands()
    found = way(rows, table).score(ITEMS.int())
    weights = torch.randn(
        ITEMS.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    got = torch.autograd.grad((found * weights).sum(), (rows, table))
    expected_rows, expected_table = torch.zeros_like(rows), torch.zeros_like(table)
    for b in range(N):
        for t, item in enumerate(ITEMS[b].tolist()):
            cell = sum(float(rows[b, j]) * float(table[item, j]) for j in range(D))
            assert float(found[b, t].detach()) == pytest.approx(cell)
            expected_rows[b] += weights[b, t] * table[item].detach()
            expected_table[item] += weights[b, t] * rows[b].detach()
    torch.testing.assert_close(got[0], expected_rows)
    torch.testing.assert_close(got[1], expected_table)


@every_way
def test_all_cells_and_their_gradients(way: Any) -> None:
    rows, table = operands()
    found = way(rows, table).score_all()
    assert (found[:, 0] == -torch.inf).all()
    loss = torch.logsumexp(found, 1).sum()
    wanted = torch.logsumexp((rows @ table.t())[:, 1:], 1).sum()
    torch.testing.assert_close(found[:, 1:], (rows @ table.t())[:, 1:])
    pairs = zip(*(torch.autograd.grad(x, (rows, table)) for x in (loss, wanted)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
        assert got.abs().sum() > 0


@every_way
def test_lists(way: Any) -> None:
    rows, table = operands()
    dense = (rows @ table.t()).tolist()
    ranking = way(rows, table).ranking()
    hidden = {0: [1, 2], 3: [11]}
    without = Seen.from_pairs(torch.tensor([0, 0, 3]), torch.tensor([1, 2, 11]), N, N_ITEMS)
    places = torch.tensor([3, 0, 4])
    for seen, left_out in ((None, {}), (without, hidden)):
        found = ranking.top_k(places, 4, seen)
        assert not found.requires_grad
        for place, row in zip(places.tolist(), found.tolist(), strict=True):
            allowed = [i for i in range(1, N_ITEMS) if i not in left_out.get(place, [])]
            assert row == sorted(allowed, key=lambda i: -dense[place][i])[:4]


@every_way
def test_lists_leave_the_scores_as_they_are(way: Any) -> None:
    rows, table = operands()
    scores = way(rows, table)
    before = scores.score(torch.zeros((N, 1), dtype=torch.int64)).detach().clone()
    scores.ranking().top_k(torch.arange(N), 3)
    assert torch.equal(scores.score(torch.zeros((N, 1), dtype=torch.int64)), before)


class Counting(TorchFunctionMode):
    """How many products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.products += name in ("matmul", "__matmul__", "mm", "bmm", "linear", "apply")
        return func(*args, **(kwargs or {}))


def test_a_known_product_is_not_computed_again() -> None:
    rows, table = operands()
    other = torch.randn(
        N, N_ITEMS, dtype=torch.float64
    )  # other numbers, to see where they come from
    scores = FactoredBatchScores(rows, table, other)
    with Counting() as counting:
        everything, cells = scores.score_all(), scores.score(ITEMS)
    assert counting.products == 0
    assert torch.equal(everything[:, 1:], other[:, 1:])
    assert torch.equal(cells, other.gather(1, ITEMS))
    with Counting() as counting:
        FactoredBatchScores(rows, table).score_all()
    assert counting.products == 1
