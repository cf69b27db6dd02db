"""Each function against the simplest loop that computes the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.core import products
from recbole_rcekd.core.closure import closure_gap
from recbole_rcekd.core.functional import (
    at_least_float32,
    count_above,
    draw_without_replacement,
    first_distinct,
    is_member,
    masked_log_softmax,
    masked_softmax,
    mixed_cross_entropy,
    ndcg_against,
    plackett_luce,
    positions_in,
    soft_cross_entropy,
    unit_rows,
    votes_from_below,
)
from recbole_rcekd.core.products import picked_products, scores_at

# Few values, so that ties and repeats are common.
few_ids = st.integers(0, 4)
few_scores = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.5, 3.0])
scores = st.floats(-30, 30)


def rows(
    elements: st.SearchStrategy[float], n: int, width: int
) -> st.SearchStrategy[list[list[float]]]:
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


def test_unit_rows() -> None:
    found = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]], dtype=torch.float64))
    assert found.tolist() == [[3 / 5, 4 / 5], [0.0, 0.0], [0.0, -1.0]]
    assert unit_rows(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


# -- softmax, cross-entropy, Plackett–Luce ---------------------------------------------------------


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


def test_masked_softmax() -> None:
    scores = torch.tensor(
        [[1.0, 2.0, 50.0], [3.0, 4.0, 5.0]], dtype=torch.float64, requires_grad=True
    )
    found = masked_softmax(scores, torch.tensor([[True, True, False], [False, False, False]]))
    share = math.e / (math.e + math.e**2)
    torch.testing.assert_close(
        found, torch.tensor([[share, 1 - share, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    )
    (grad,) = torch.autograd.grad(found[:, 0].sum(), scores)
    slope = share * (1 - share)
    torch.testing.assert_close(
        grad, torch.tensor([[slope, -slope, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    )


def test_masked_log_softmax_at_the_edges() -> None:
    x = torch.tensor(
        [[1e4, -1e4, torch.nan], [torch.nan, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True
    )
    keep = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    found = masked_log_softmax(x, keep)
    assert found[0].tolist() == [0.0, -2e4, 0.0]  # NaN outside the mask does not matter
    assert found[1, :2].isnan().all()  # NaN inside the mask stays NaN
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(found[[0, 2]].sum(), x)
    assert gradient[[0, 2]].isfinite().all()
    assert not gradient[2].any()


def test_the_mask_is_below_every_score() -> None:
    low = torch.tensor([[-3e30, -3e30, 0.0]])
    found = masked_log_softmax(low, torch.tensor([[True, True, False]]))
    assert found.tolist() == [pytest.approx([-math.log(2), -math.log(2), 0.0])]
    head, tail = torch.tensor([[-3e4, -3e4]]), torch.zeros(1, 1)
    picked = plackett_luce(
        head, tail, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    )
    assert picked.item() == pytest.approx(math.log(2), abs=5e-3)  # float32 resolves 0.002 at 3e4


def test_half_precision_is_computed_in_single() -> None:
    assert masked_log_softmax(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    # 300 equal scores: 300 times e^−ln 300 is 1, except for rounding. In bfloat16 the error would
    # be some percent.
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
            expected -= (
                math.exp(t[row, i] / tau) / q_sum * math.log(math.exp(s[row, i] / tau) / p_sum)
            )
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


def plain_mixture(
    s: Tensor, t: Tensor, first: int, gamma: Tensor, keep: Tensor, tau: float
) -> Tensor:
    """(1 − γ)·CE(first) + γ·CE(rest), with the gradient by autograd."""

    def cross_entropy(columns: slice, kept: Tensor | None) -> Tensor:
        q = masked_log_softmax(t[:, columns] / tau, kept).exp()
        return -(q * masked_log_softmax(s[:, columns] / tau, kept)).sum(-1)

    kept, also = (None, None) if keep is None else (keep[:, :first], keep[:, first:])
    return (1 - gamma) * cross_entropy(slice(first), kept) + gamma * cross_entropy(
        slice(first, None), also
    )


@given(
    st.data(),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from([0.3, 1.0, 5.0]),
)
def test_mixed_cross_entropy(
    data: st.DataObject, n: int, first: int, rest: int, tau: float
) -> None:
    """In value and gradient, with rows that keep nothing and γ from 0 to 1."""
    width = first + rest
    s, t = (exact(data.draw(rows(st.floats(-8, 8), n, width)), n, width) for _ in range(2))
    keep = ids(data.draw(rows(st.integers(0, 1), n, width)), n, width).bool()
    gamma = exact(data.draw(rows(st.sampled_from([0.0, 0.25, 1.0]), n, 1)), n, 1).squeeze(1)
    upstream = torch.arange(1.0, n + 1, dtype=torch.float64)
    s.requires_grad_()
    found = mixed_cross_entropy(s, t, first, gamma, keep, tau)
    expected = plain_mixture(s, t, first, gamma, keep, tau)
    assert found.shape == (n,)
    torch.testing.assert_close(found, expected)
    ours, plain = (
        torch.autograd.grad((value * upstream).sum(), s)[0] for value in (found, expected)
    )
    torch.testing.assert_close(ours, plain)
    for row in range(n):
        assert not ours[row][~keep[row]].any()


@given(st.data(), st.integers(0, 3), st.integers(1, 5), st.sampled_from([0.5, 1.0, 4.0]))
def test_gradient_of_soft_cross_entropy(
    data: st.DataObject, n: int, width: int, tau: float
) -> None:
    s, t = (exact(data.draw(rows(st.floats(-8, 8), n, width)), n, width) for _ in range(2))
    keep = ids(data.draw(rows(st.integers(0, 1), n, width)), n, width).bool()
    s.requires_grad_()
    plain = -(
        masked_log_softmax(t / tau, keep).exp() * keep * masked_log_softmax(s / tau, keep)
    ).sum(-1)
    for ours, expected in zip(
        torch.autograd.grad(soft_cross_entropy(s, t, keep, tau).square().sum(), s),
        torch.autograd.grad(plain.square().sum(), s),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_cross_entropies_pass_gradcheck(tau: float) -> None:
    s, t = (
        torch.randn(4, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 7, dtype=torch.float64),
    )
    keep = torch.rand(4, 7) < 0.6
    keep[2] = False
    gamma = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mixed_cross_entropy(x, t, 3, gamma, keep, tau), (s,))
    assert torch.autograd.gradcheck(lambda x: mixed_cross_entropy(x, t, 3, gamma, None, tau), (s,))
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, t, keep, tau), (s,))
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, t, None, tau), (s,))


def test_a_mixture_by_hand() -> None:
    # Two sets of two items: equal scores in each give ln 2. With γ = 0 or 1 only one set counts.
    s = torch.tensor([[0.0, 0.0, 3.0, 0.0]]).expand(3, 4)
    gamma = torch.tensor([0.0, 0.5, 1.0])
    second = -0.5 * math.log(1 / (1 + math.exp(-3))) - 0.5 * math.log(1 / (1 + math.exp(3)))
    found = mixed_cross_entropy(s, torch.zeros(3, 4), 2, gamma)
    assert found.tolist() == pytest.approx(
        [math.log(2), (math.log(2) + second) / 2, second], abs=1e-6
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_kept_is_of_no_account(bad: float) -> None:
    s, t = torch.randn(3, 6), torch.randn(3, 6)
    keep = torch.tensor([[True] * 5 + [False]] * 3)
    gamma = torch.tensor([0.0, 0.4, 1.0])
    values, gradients = [], []
    for filling in (0.0, bad):
        student, teacher = s.clone(), t.clone()
        student[:, 5] = teacher[:, 5] = filling
        student.requires_grad_()
        value = mixed_cross_entropy(student, teacher, 3, gamma, keep)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), student)[0])
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    s[1, 4] = torch.nan  # a kept NaN stays NaN
    assert mixed_cross_entropy(s, t, 3, gamma, keep).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropies_in_half_precision(dtype: torch.dtype) -> None:
    s, t = (20 * torch.randn(5, 8)).to(dtype), (20 * torch.randn(5, 8)).to(dtype)
    keep = torch.rand(5, 8) < 0.5
    keep[0] = False
    gamma = torch.rand(5)
    halves, singles = s.clone().requires_grad_(), s.float().requires_grad_()
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: mixed_cross_entropy(x, y, 4, gamma, keep, 2.0),
        lambda x, y: soft_cross_entropy(x, y, keep),
    ]
    for loss in losses:
        found, expected = loss(halves, t), loss(singles, t.float())
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        (ours,) = torch.autograd.grad(found.sum(), halves)
        (plain,) = torch.autograd.grad(expected.sum(), singles)
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain.to(dtype))


def test_cross_entropies_of_frozen_scores_and_without_rows() -> None:
    assert not soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3)).requires_grad
    s = torch.zeros(0, 3, requires_grad=True)
    found = mixed_cross_entropy(
        s, torch.zeros(0, 3), 1, torch.zeros(0), torch.zeros(0, 3, dtype=torch.bool)
    )
    assert found.shape == (0,)
    assert torch.autograd.grad(found.sum(), s)[0].shape == (0, 3)


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
            expected += (
                math.log(sum(math.exp(x[row, i]) for i in [*head[place:], *tail]))
                - x[row, item].item()
            )
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
    every = plackett_luce(
        head, tail, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    )
    assert torch.equal(plackett_luce(head, tail), every)
    head.requires_grad_()
    nothing = plackett_luce(
        head, tail, torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    )
    assert nothing.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(nothing.sum(), head)[0].any()


# -- sets and counts -------------------------------------------------------------------------------


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
    assert found.tolist() == [
        [sum(row[place if inclusive else place + 1 :]) for place in range(m)] for row in voters
    ]


@given(st.data(), st.integers(0, 3), st.integers(0, 5), st.integers(0, 7))
def test_count_above_with_ties(data: st.DataObject, n: int, k: int, n_all: int) -> None:
    some, every = data.draw(rows(few_scores, n, k)), data.draw(rows(few_scores, n, n_all))
    found = count_above(exact(some, n, k), exact(every, n, n_all))
    assert found.tolist() == [
        [sum(y > x for y in every[row]) for x in some[row]] for row in range(n)
    ]


def test_count_above_ignores_what_is_minus_infinity() -> None:
    assert count_above(
        torch.tensor([[0.0, -5.0]]), torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    ).tolist() == [[1, 2]]


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
    # Hits at positions 1 and 3 of 3: (1 + 1/2) / (1 + 1/log2 3 + 1/2).
    found = ndcg_against(
        torch.tensor([[4, 9, 5], [7, 8, 9], [6, 5, 4]]), torch.tensor([[5, 4, 6]] * 3)
    )
    assert found.tolist() == pytest.approx([1.5 / (1.5 + 1 / math.log2(3)), 0.0, 1.0], rel=1e-6)


# -- draws -----------------------------------------------------------------------------------------


def inclusion_probabilities(weights: Sequence[float], n: int) -> list[float]:
    """The probability of each position to be among n drawn in turn, summed over all orders."""
    found = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), n):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        for i in order:
            found[i] += probability
    return found


@pytest.mark.parametrize(
    ("weights", "n"), [((1, 2, 3, 4, 10), 2), ((1, 1, 1, 1), 3), ((5, 1, 1, 0.1, 0.1, 0.01), 3)]
)
def test_draws_have_the_probabilities_of_drawing_one_by_one(
    weights: tuple[float, ...], n: int
) -> None:
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
    drawn = draw_without_replacement(
        weights.log().expand(total, -1), 3, torch.Generator().manual_seed(1)
    )
    counts = torch.bincount(drawn[:, 0], minlength=4).numpy()
    assert scipy.stats.chisquare(counts, (weights / weights.sum() * total).numpy()).pvalue > 1e-3


@given(st.data(), st.integers(0, 3), st.integers(1, 6))
def test_draws_are_distinct_and_avoid_what_is_forbidden(
    data: st.DataObject, n: int, width: int
) -> None:
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
        draw_without_replacement(log_weights, 4, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_extreme_weights_are_no_trouble() -> None:
    log_weights = torch.tensor([[1e4, 0.0, -1e4]]).expand(100, 3)
    assert (draw_without_replacement(log_weights, 3, torch.Generator()) == torch.arange(3)).all()


# -- closure gap: see also test_theory.py ----------------------------------------------------------


def test_closure_gap_by_hand() -> None:
    # J = A = {i}: p = 1, and r − 1 blockers are outside: ln(1 + (r − 1)) = ln r.
    for rank in (1, 2, 10):
        gap = closure_gap(
            torch.ones(1, 1),
            torch.zeros(1, 1),
            torch.tensor([[rank - 1]]),
            torch.zeros(1, 1),
            torch.ones(1, 1).bool(),
        )
        assert gap.item() == pytest.approx(math.log(rank), abs=1e-6)


def test_closure_gap_of_entries_that_do_not_count() -> None:
    # No target, and a target of probability 0 far above a support that does not contain it.
    target, support = torch.tensor([[1.0, 200.0]]), torch.tensor([[1.0, 2.0]])
    above = torch.tensor([[2, 0]])
    nothing = closure_gap(
        torch.zeros(1, 2), target, above, support, torch.zeros(1, 2, dtype=torch.bool)
    )
    assert nothing.tolist() == [0.0]
    partly = closure_gap(torch.tensor([[1.0, 0.0]]), target, above, support)
    # One of the two above, 2.0, is in A; the other is missing: p = 1/(1 + e).
    assert partly.item() == pytest.approx(math.log(1 + 1 / (1 + math.e)), abs=1e-6)


@given(st.data(), st.integers(0, 3), st.integers(0, 5), st.integers(1, 5))
def test_places(data: st.DataObject, n: int, q: int, t: int) -> None:
    query, table = (ids(data.draw(rows(few_ids, n, width)), n, width) for width in (q, t))
    found = positions_in(query, table)
    assert found.shape == (n, q)
    for row in range(n):
        for item, place in zip(query[row].tolist(), found[row].tolist(), strict=True):
            standing = [column for column, other in enumerate(table[row].tolist()) if other == item]
            assert place in standing if standing else place == -1


# -- a few cells of a product ----------------------------------------------------------------------

# With these limits, a copy of the picked rows is made, or not. In half precision, and on other
# devices than the CPU, rows are gathered in parts.
BRANCHES = {
    "copied": (torch.float64, 10**9),
    "sampled": (torch.float64, -1),
    "gathered": (torch.bfloat16, -1),
}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("at_a_time", [1, 10**6])
def test_the_ways_to_picked_products(
    branch: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, kept_cells = BRANCHES[branch]
    monkeypatch.setattr(products, "_KEPT_CELLS", kept_cells)
    monkeypatch.setattr(products, "_GATHERED_CELLS", at_a_time)
    sampled: list[int] = []
    plain_scores_at = products.scores_at

    def counted(*args: Tensor) -> Tensor:
        sampled.append(len(args[1]))
        return plain_scores_at(*args)

    monkeypatch.setattr(products, "scores_at", counted)
    # Small whole numbers: exact in every precision, so that sums in any order are the same.
    draw = torch.Generator().manual_seed(0)
    left, table = (
        torch.randint(-3, 4, (n, 5), generator=draw).to(dtype).requires_grad_() for n in (6, 9)
    )
    items = torch.randint(0, 9, (6, 4), generator=draw)
    upstream = torch.randint(-2, 3, (6, 4), generator=draw).to(dtype)
    for ids_type in (torch.int64, torch.int32):
        found = picked_products(left, table, items.to(ids_type))
        expected = (left @ table.t()).gather(1, items)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        ours, plain = (
            torch.autograd.grad((value * upstream).sum(), (left, table))
            for value in (found, expected)
        )
        for own, other in zip(ours, plain, strict=True):
            assert own.dtype == dtype
            assert torch.equal(own, other)
    assert sampled == ([24, 24] if branch == "sampled" else [])


@pytest.mark.parametrize("kept_cells", [-1, 10**9])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("width", [0, 1, 4])
def test_picked_products_pass_gradcheck(
    n: int, width: int, kept_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_KEPT_CELLS", kept_cells)
    left = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    items = torch.randint(0, 5, (n, width))
    assert picked_products(left, table, items).shape == (n, width)
    if n * width:
        assert torch.autograd.gradcheck(lambda x, y: picked_products(x, y, items), (left, table))
    gradients = torch.autograd.grad(picked_products(left, table, items).sum(), (left, table))
    assert [g.shape for g in gradients] == [left.shape, table.shape]


@pytest.mark.parametrize("kept_cells", [-1, 10**9])
def test_picked_products_of_parts_of_other_tensors(
    kept_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed tables, every other column, a gradient that is one number for all cells."""
    monkeypatch.setattr(products, "_KEPT_CELLS", kept_cells)
    whole, turned = torch.randn(6, 8, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    left, table = whole[:, ::2].requires_grad_(), turned.t().requires_grad_()
    items = torch.randint(0, 9, (12, 6)).t()[:, ::2]
    found, expected = picked_products(left, table, items), (left @ table.t()).gather(1, items)
    torch.testing.assert_close(found, expected)
    for own, other in zip(
        torch.autograd.grad(found.sum(), (left, table)),
        torch.autograd.grad(expected.sum(), (left, table)),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kept_cells", [-1, 10**9])
def test_picked_products_under_autocast_are_single_precision(
    kept_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product in half precision would give single-precision tables half-precision gradients."""
    monkeypatch.setattr(products, "_KEPT_CELLS", kept_cells)
    left, table = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    items = torch.randint(0, 7, (4, 5))
    expected = picked_products(left, table, items)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = picked_products(left, table, items)
        mixed = picked_products(left.bfloat16(), table, items)  # rows that are a layer's output
    assert torch.equal(found, expected)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, rtol=0.02, atol=0.02)
    for value in (found, mixed):
        assert all(
            g.dtype == torch.float32 for g in torch.autograd.grad(value.sum(), (left, table))
        )


def test_picked_products_have_one_derivative() -> None:
    left, table = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        picked_products(left, table, torch.tensor([[1], [2]])).square().sum(),
        left,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradient.sum())


@given(st.data(), st.lists(st.integers(0, 4), max_size=4), st.integers(1, 3))
def test_scores_of_lists_of_any_length(data: st.DataObject, lengths: list[int], d: int) -> None:
    """In any order, with repeats and empty lists."""
    n = sum(lengths)
    items = torch.tensor(data.draw(st.lists(few_ids, min_size=n, max_size=n)), dtype=torch.int64)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    left = exact(data.draw(rows(scores, len(lengths), d)), len(lengths), d)
    table = exact(data.draw(rows(scores, 5, d)), 5, d)
    found = scores_at(starts, items, left, table)
    expected = [left[row] @ table[item] for row, item in zip(owners(lengths), items, strict=True)]
    torch.testing.assert_close(
        found, torch.stack(expected) if expected else torch.zeros(0, dtype=torch.float64)
    )


def owners(lengths: list[int]) -> list[int]:
    return [row for row, length in enumerate(lengths) for _ in range(length)]


@given(st.data(), st.integers(0, 4), st.integers(0, 6), st.integers(1, 3))
def test_picked_products_are_cells_of_the_product(
    data: st.DataObject, n: int, width: int, d: int
) -> None:
    """With repeats within and across rows, in any order; the value and both gradients."""
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
