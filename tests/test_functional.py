"""Each function against the plainest loop that says the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.functional import (
    at_least_float32,
    closure_gap,
    count_above,
    draw_without_replacement,
    first_distinct,
    is_member,
    masked_log_softmax,
    ndcg_against,
    picked_products,
    plackett_luce,
    soft_cross_entropy,
    votes_from_below,
)

# Few values, so that ties and repeats are common.
few_ids = st.integers(0, 4)
few_scores = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.5, 3.0])
scores = st.floats(-30, 30)


def rows(elements: st.SearchStrategy[float], n: int, width: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(elements, min_size=width, max_size=width), min_size=n, max_size=n)


def ids(values: Sequence[Sequence[float]], n: int, width: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).reshape(n, width)


def exact(values: Sequence[Sequence[float]], n: int, width: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(n, width)


def test_at_least_float32() -> None:
    for given_type, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert at_least_float32(torch.zeros(2, dtype=given_type)).dtype == expected


# -- softmax, cross-entropy, Plackett–Luce -------------------------------------------------------------------------


@given(st.data(), st.integers(0, 3), st.integers(1, 6))
def test_masked_log_softmax(data: st.DataObject, n: int, width: int) -> None:
    x = exact(data.draw(rows(scores, n, width)), n, width)
    keep = ids(data.draw(rows(st.integers(0, 1), n, width)), n, width).bool()
    found = masked_log_softmax(x, keep)
    for row in range(n):
        total = sum(math.exp(x[row, i]) for i in range(width) if keep[row, i])
        for i in range(width):
            expected = x[row, i].item() - math.log(total) if keep[row, i] else 0.0
            assert found[row, i].item() == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(masked_log_softmax(x), masked_log_softmax(x, torch.ones_like(keep)))


def test_masked_log_softmax_at_the_edges() -> None:
    x = torch.tensor([[1e4, -1e4, torch.nan], [torch.nan, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    keep = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    found = masked_log_softmax(x, keep)
    assert found[0].tolist() == [0.0, -2e4, 0.0]  # NaN outside the mask is of no account
    assert found[1, :2].isnan().all()  # NaN inside stays visible
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(found[[0, 2]].sum(), x)
    assert gradient[[0, 2]].isfinite().all()
    assert not gradient[2].any()


def test_the_mask_is_below_every_score() -> None:
    low = torch.tensor([[-3e30, -3e30, 0.0]])
    found = masked_log_softmax(low, torch.tensor([[True, True, False]]))
    assert found.tolist() == [pytest.approx([-math.log(2), -math.log(2), 0.0])]
    head, tail = torch.tensor([[-3e4, -3e4]]), torch.zeros(1, 1)
    picked = plackett_luce(head, tail, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool))
    assert picked.item() == pytest.approx(math.log(2), abs=5e-3)  # float32 resolves 0.002 at 3e4


def test_half_precision_is_computed_in_single() -> None:
    assert masked_log_softmax(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    # 300 equal scores: e^−ln 300, 300 times, is 1 but for rounding; in bfloat16 it is off by percents.
    total = masked_log_softmax(torch.zeros(1, 300, dtype=torch.bfloat16)).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)


@given(st.data(), st.integers(0, 3), st.integers(1, 5), st.sampled_from([0.5, 1.0, 4.0]))
def test_soft_cross_entropy(data: st.DataObject, n: int, width: int, tau: float) -> None:
    s, t = (exact(data.draw(rows(st.floats(-8, 8), n, width)), n, width) for _ in range(2))
    keep = ids(data.draw(rows(st.integers(0, 1), n, width)), n, width).bool()
    found = soft_cross_entropy(s, t, keep, tau)
    assert found.shape == (n,)
    for row in range(n):
        kept = [i for i in range(width) if keep[row, i]]
        p_sum, q_sum = (sum(math.exp(x[row, i] / tau) for i in kept) for x in (s, t))
        expected = 0.0
        for i in kept:
            expected -= math.exp(t[row, i] / tau) / q_sum * math.log(math.exp(s[row, i] / tau) / p_sum)
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


@given(st.data(), st.integers(0, 3), st.integers(0, 4), st.integers(0, 4))
def test_plackett_luce(data: st.DataObject, n: int, k: int, rest: int) -> None:
    x = exact(data.draw(rows(st.floats(-8, 8), n, k + rest)), n, k + rest)
    keep = ids(data.draw(rows(st.integers(0, 1), n, k + rest)), n, k + rest).bool()
    found = plackett_luce(x[:, :k], x[:, k:], keep[:, :k], keep[:, k:])
    assert found.shape == (n,)
    for row in range(n):
        head = [i for i in range(k) if keep[row, i]]
        tail = [i for i in range(k, k + rest) if keep[row, i]]
        expected = 0.0
        for place, item in enumerate(head):
            expected += math.log(sum(math.exp(x[row, i]) for i in [*head[place:], *tail])) - x[row, item].item()
        assert found[row].item() == pytest.approx(expected, abs=1e-9)


def test_plackett_luce_is_a_probability_over_orders() -> None:
    # Over all orders of all pairs out of four items, the probabilities add up to 1.
    x = torch.randn(4, dtype=torch.float64)
    total = 0.0
    for pair in itertools.permutations(range(4), 2):
        others = [i for i in range(4) if i not in pair]
        total += math.exp(-plackett_luce(x[None, list(pair)], x[None, others]).item())
    assert total == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_masks_are_optional_and_empty_rows_are_free() -> None:
    head, tail = torch.randn(2, 3), torch.randn(2, 4)
    every = plackett_luce(head, tail, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(plackett_luce(head, tail), every)
    head.requires_grad_()
    nothing = plackett_luce(head, tail, torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
    assert nothing.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(nothing.sum(), head)[0].any()


# -- sets and counts -----------------------------------------------------------------------------------------------


@given(st.data(), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5))
def test_is_member_with_repeats(data: st.DataObject, n: int, q: int, t: int) -> None:
    query, table = data.draw(rows(few_ids, n, q)), data.draw(rows(few_ids, n, t))
    found = is_member(ids(query, n, q), ids(table, n, t))
    assert found.dtype == torch.bool
    assert found.tolist() == [[item in table[row] for item in query[row]] for row in range(n)]


@given(st.data(), st.integers(0, 3), st.integers(0, 6), st.booleans())
def test_votes_from_below(data: st.DataObject, n: int, m: int, inclusive: bool) -> None:
    voters = data.draw(rows(st.integers(0, 1), n, m))
    found = votes_from_below(ids(voters, n, m).bool(), inclusive)
    assert found.tolist() == [[sum(row[place if inclusive else place + 1 :]) for place in range(m)] for row in voters]


@given(st.data(), st.integers(0, 3), st.integers(0, 5), st.integers(0, 7))
def test_count_above_with_ties(data: st.DataObject, n: int, k: int, n_all: int) -> None:
    some, every = data.draw(rows(few_scores, n, k)), data.draw(rows(few_scores, n, n_all))
    found = count_above(exact(some, n, k), exact(every, n, n_all))
    assert found.tolist() == [[sum(y > x for y in every[row]) for x in some[row]] for row in range(n)]


def test_count_above_ignores_what_is_minus_infinity() -> None:
    assert count_above(torch.tensor([[0.0, -5.0]]), torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])).tolist() == [
        [1, 2]
    ]


@given(st.data(), st.integers(0, 3), st.integers(1, 7))
def test_first_distinct(data: st.DataObject, n: int, r: int) -> None:
    candidates = data.draw(rows(st.integers(1, 5), n, r))
    allowed = data.draw(rows(st.integers(0, 1), n, r))
    wanted = data.draw(st.integers(0, r))
    found_ids, found = first_distinct(ids(candidates, n, r), ids(allowed, n, r).bool(), wanted)
    for row in range(n):
        expected: list[float] = []
        for item, usable in zip(candidates[row], allowed[row], strict=True):
            if usable and item not in expected:
                expected.append(item)
        expected = expected[:wanted]
        missing = wanted - len(expected)
        assert found_ids[row].tolist() == expected + [0] * missing
        assert found[row].tolist() == [True] * len(expected) + [False] * missing


def test_ndcg_against() -> None:
    # Hits at places 1 and 3 of 3: (1 + 1/2) / (1 + 1/log2 3 + 1/2).
    found = ndcg_against(torch.tensor([[4, 9, 5], [7, 8, 9], [6, 5, 4]]), torch.tensor([[5, 4, 6]] * 3))
    assert found.tolist() == pytest.approx([1.5 / (1.5 + 1 / math.log2(3)), 0.0, 1.0], rel=1e-6)


# -- draws ---------------------------------------------------------------------------------------------------------


def inclusion_probabilities(weights: Sequence[float], n: int) -> list[float]:
    """How likely each position is to be among n drawn one by one, by going through all orders."""
    found = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), n):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        for i in order:
            found[i] += probability
    return found


@pytest.mark.parametrize(("weights", "n"), [((1, 2, 3, 4, 10), 2), ((1, 1, 1, 1), 3), ((5, 1, 1, 0.1, 0.1, 0.01), 3)])
def test_draws_have_the_probabilities_of_drawing_one_by_one(weights: tuple[float, ...], n: int) -> None:
    # P12
    total = 40_000
    log_weights = torch.tensor(weights, dtype=torch.float32).log().expand(total, -1)
    drawn = draw_without_replacement(log_weights, n, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=len(weights)).double() / total
    expected = torch.tensor(inclusion_probabilities(weights, n), dtype=torch.float64)
    deviation = (expected * (1 - expected) / total).sqrt()
    assert ((counts - expected).abs() < 4 * deviation + 1e-9).all()


def test_the_first_drawn_follows_the_weights() -> None:
    total, weights = 40_000, torch.tensor([1.0, 2.0, 3.0, 6.0])
    drawn = draw_without_replacement(weights.log().expand(total, -1), 3, torch.Generator().manual_seed(1))
    counts = torch.bincount(drawn[:, 0], minlength=4).numpy()
    assert scipy.stats.chisquare(counts, (weights / weights.sum() * total).numpy()).pvalue > 1e-3


@given(st.data(), st.integers(0, 3), st.integers(1, 6))
def test_draws_are_distinct_and_avoid_what_is_forbidden(data: st.DataObject, n: int, width: int) -> None:
    forbidden = ids(data.draw(rows(st.integers(0, 1), n, width)), n, width).bool()
    wanted = data.draw(st.integers(0, width))
    log_weights = torch.zeros(n, width).masked_fill(forbidden, -torch.inf)
    drawn = draw_without_replacement(log_weights, wanted, torch.Generator().manual_seed(0))
    assert drawn.shape == (n, wanted)
    for row in range(n):
        places = drawn[row].tolist()
        assert len(set(places)) == wanted
        n_allowed = width - int(forbidden[row].sum())
        assert sum(not forbidden[row, place] for place in places) == min(wanted, n_allowed)


def test_draws_repeat_with_the_generator() -> None:
    log_weights = torch.zeros(5, 20)
    first, again, other = (
        draw_without_replacement(log_weights, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_extreme_weights_are_no_trouble() -> None:
    log_weights = torch.tensor([[1e4, 0.0, -1e4]]).expand(100, 3)
    assert (draw_without_replacement(log_weights, 3, torch.Generator()) == torch.arange(3)).all()


# -- closure gap: see also test_theory.py --------------------------------------------------------------------------


def test_closure_gap_by_hand() -> None:
    # J = A = {i}: p = 1, and r − 1 blockers are outside: ln(1 + (r − 1)) = ln r.
    for rank in (1, 2, 10):
        gap = closure_gap(
            torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([[rank - 1]]), torch.zeros(1, 1), torch.ones(1, 1).bool()
        )
        assert gap.item() == pytest.approx(math.log(rank), abs=1e-6)


def test_closure_gap_of_entries_that_do_not_count() -> None:
    # No target; and a target of probability 0 far above a support that it is not in.
    target, support = torch.tensor([[1.0, 200.0]]), torch.tensor([[1.0, 2.0]])
    above = torch.tensor([[2, 0]])
    nothing = closure_gap(torch.zeros(1, 2), target, above, support, torch.zeros(1, 2, dtype=torch.bool))
    assert nothing.tolist() == [0.0]
    partly = closure_gap(torch.tensor([[1.0, 0.0]]), target, above, support)
    # One of the two above, 2.0, is in A; the other is missing: p = 1/(1 + e).
    assert partly.item() == pytest.approx(math.log(1 + 1 / (1 + math.e)), abs=1e-6)


# -- a few cells of a product --------------------------------------------------------------------------------------


@given(st.data(), st.integers(0, 4), st.integers(0, 6), st.integers(1, 3))
def test_picked_products_are_cells_of_the_product(data: st.DataObject, n: int, width: int, d: int) -> None:
    """Repeats within and across rows, in any order, in value and in both gradients."""
    items = ids(data.draw(rows(few_ids, n, width)), n, width)
    left = exact(data.draw(rows(scores, n, d)), n, d).requires_grad_()
    table = exact(data.draw(rows(scores, 5, d)), 5, d).requires_grad_()
    upstream = torch.arange(1.0, n * width + 1, dtype=torch.float64).reshape(n, width)
    found = picked_products(left, table, items)
    expected = (left @ table.t()).gather(1, items)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(
        torch.autograd.grad((found * upstream).sum(), (left, table)),
        torch.autograd.grad((expected * upstream).sum(), (left, table)),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("frozen", [0, 1])
def test_picked_products_with_one_side_frozen(frozen: int) -> None:
    sides = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)]
    sides[1 - frozen].requires_grad_()
    items = torch.tensor([[3, 3], [0, 1], [2, 0]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, y: picked_products(x, y, items), sides)


def test_picked_products_in_half_precision() -> None:
    left, table = torch.randn(3, 2).bfloat16(), torch.randn(4, 2).bfloat16()
    items = torch.tensor([[3, 3], [0, 1], [2, 0]])
    found = picked_products(left, table, items)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (left @ table.t()).gather(1, items))
