"""Cross-entropy over the catalogue against loops, and blocks of any size against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.core import full_softmax as catalogue
from recbole_rcekd.core.full_softmax import catalogue_cross_entropy, sum_over_blocks


def slow(scores: Tensor, items: Tensor, weights: Tensor, temperature: float) -> list[float]:
    found = []
    for row, own, weight in zip(scores.tolist(), items.tolist(), weights.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(s / temperature) for s in row[1:]))
        pairs = zip(own, weight, strict=True)
        found.append(sum(w * (normaliser - row[i] / temperature) for i, w in pairs if i != 0))
    return found


def case(
    seed: int = 0, rows: int = 4, n_items: int = 9, k: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n_items, dtype=torch.float64, generator=draw)
    items = torch.stack([torch.randperm(n_items, generator=draw)[:k] for _ in range(rows)])
    return scores, items, torch.rand(rows, k, dtype=torch.float64, generator=draw)


@given(
    seed=st.integers(0, 10**6), k=st.integers(0, 6), temperature=st.sampled_from([0.3, 1.0, 4.0])
)
def test_cross_entropy_is_a_sum_over_the_catalogue(seed: int, k: int, temperature: float) -> None:
    scores, items, weights = case(seed, k=k)
    found = catalogue_cross_entropy(scores, items, weights, temperature)
    assert found.tolist() == pytest.approx(slow(scores, items, weights, temperature), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_its_gradient(temperature: float) -> None:
    scores, items, weights = case()
    items[1] = 0  # no items to learn from
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: catalogue_cross_entropy(x, items, weights, temperature), scores
    )
    catalogue_cross_entropy(  # type: ignore[no-untyped-call]
        scores, items, weights, temperature
    ).sum().backward()
    assert scores.grad is not None
    # A shift of a row's scores changes nothing, padding does not count, and the row without items
    # has no gradient.
    torch.testing.assert_close(
        scores.grad.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert (scores.grad[:, 0] == 0).all()
    assert (scores.grad[1] == 0).all()


def test_hidden_items_and_padding_are_not_in_the_normaliser() -> None:
    scores = torch.tensor([[7.0, 1.0, -torch.inf, 2.0]], requires_grad=True)
    # log(e + e²) − 2 for the third item; the values of column 0 do not matter.
    found = catalogue_cross_entropy(scores, torch.tensor([[3, 0]]), torch.tensor([[1.0, 5.0]]))
    assert found.item() == pytest.approx(math.log(math.e + math.e**2) - 2.0, abs=1e-6)
    found.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    share = math.e / (math.e + math.e**2)
    assert scores.grad[0].tolist() == pytest.approx([0.0, share, 0.0, -share], abs=1e-6)


def test_scores_of_any_size() -> None:
    scores = torch.tensor([[0.0, 1e4, 1e4, -1e4]], requires_grad=True)
    found = catalogue_cross_entropy(scores, torch.tensor([[3]]), torch.tensor([[1.0]]))
    assert found.item() == pytest.approx(2e4 + math.log(2))
    found.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([0.0, 0.5, 0.5, -1.0])


# --- blocks ---------------------------------------------------------------------------------------


def tables(rows: int = 7, n_items: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return (
        torch.randn(rows, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(n_items, 3, dtype=torch.float64, requires_grad=True),
    )


def curved(scores: Tensor, places: Tensor) -> Tensor:
    """A loss of each row that depends on the position of the row."""
    return (scores[:, 1:] * (1.0 + places.unsqueeze(1))).sin().square().sum(1)


@pytest.mark.parametrize("cells", [1, 5, 15, 10**6])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_are_autograd_in_parts(
    cells: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_CELLS", {"cpu": cells})
    rows, table = tables()
    weights = torch.rand(7, dtype=torch.float64) if weighted else None
    sizes = []

    def noted(scores: Tensor, places: Tensor) -> Tensor:
        assert (scores[:, 0] == -torch.inf).all()
        sizes.append(len(scores))
        return curved(scores, places)

    found = sum_over_blocks(rows, table, noted, weights)
    assert max(sizes) == max(1, min(7, cells // 5))
    assert sum(sizes) == 7  # each score once
    losses = curved(rows @ table.t(), torch.arange(7))
    expected = (losses if weights is None else losses * weights).sum()
    torch.testing.assert_close(found, expected)
    for own, other in zip(
        torch.autograd.grad(2.5 * found, (rows, table)),
        torch.autograd.grad(2.5 * expected, (rows, table)),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_blocks_within_a_graph() -> None:
    """If rows and table are outputs of layers (as in LightGCN), they pass the gradient on."""
    rows, table = tables()
    found = sum_over_blocks(rows.exp(), torch.cat([table, table], dim=0) * 2.0, curved)
    expected = curved(
        rows.exp() @ (torch.cat([table, table], dim=0) * 2.0).t(), torch.arange(7)
    ).sum()
    for own, other in zip(
        torch.autograd.grad(found, (rows, table)),
        torch.autograd.grad(expected, (rows, table)),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_a_table_that_is_not_learned_and_a_value_without_gradient() -> None:
    rows, table = tables()
    (own,) = torch.autograd.grad(sum_over_blocks(rows, table.detach(), curved), rows)
    (expected,) = torch.autograd.grad(curved(rows @ table.t(), torch.arange(7)).sum(), rows)
    torch.testing.assert_close(own, expected)
    with torch.no_grad():
        found = sum_over_blocks(rows, table, curved)
    assert not found.requires_grad
    torch.testing.assert_close(found, curved(rows @ table.t(), torch.arange(7)).sum())


def test_nothing_that_a_loss_makes_of_padding_reaches_the_table() -> None:
    rows, table = tables()

    def careless(scores: Tensor, places: Tensor) -> Tensor:
        return scores[:, 1] + 0.0 * scores[:, 0].exp().sqrt()  # 0, with a slope of 0·∞

    grads: Any = torch.autograd.grad(sum_over_blocks(rows, table, careless), (rows, table))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][0] == 0).all()


def test_under_autocast_scores_are_single_precision() -> None:
    rows, table = (x.detach().float().requires_grad_() for x in tables())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sum_over_blocks(rows.bfloat16(), table, curved)
    expected = curved(rows.bfloat16().float() @ table.t(), torch.arange(7)).sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    found.backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
