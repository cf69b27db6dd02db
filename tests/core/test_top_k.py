"""Top-K lists from half-precision bounds, against a sort of whole rows in float64.

If two scores are equal within the precision of float32, either may come first. So the scores of the
lists are compared, and the ids only if all scores are exact numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.core import top_k as ranking
from recbole_rcekd.core.products import scores_at
from recbole_rcekd.core.top_k import ProductRanking, RowRanking
from recbole_rcekd.core.types import Seen
from tests.tables import seen_of

N_USERS, N_ITEMS, WIDTH = 40, 700, 12


@pytest.fixture(autouse=True)
def _the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use bfloat16 on any CPU: it may be slow, but the result is the same."""
    monkeypatch.setattr(ranking, "has_bfloat16_arithmetic", lambda: True)


class Counted(ProductRanking):
    """Notes which users were ranked in which way."""

    def __init__(self, users: Tensor, items: Tensor) -> None:
        super().__init__(lambda contexts: users[contexts], items)
        self.by_candidates: list[int] = []
        self.from_rows: list[int] = []
        whole = self._from_rows.top_k

        def from_rows(contexts: Tensor, k: int, without: Seen | None = None) -> Tensor:
            self.from_rows += contexts.tolist()
            return whole(contexts, k, without)

        self._from_rows.top_k = from_rows  # type: ignore[method-assign]

    def _by_candidates(self, contexts: Tensor, *args: Any) -> Tensor:
        self.by_candidates += contexts.tolist()
        return super()._by_candidates(contexts, *args)


def tables(
    seed: int = 0, n_users: int = N_USERS, n_items: int = N_ITEMS, d: int = WIDTH
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n_users, d, generator=draw), torch.randn(n_items, d, generator=draw)


def by_rows(users: Tensor, items: Tensor) -> RowRanking:
    """The same ranking from whole rows in float32."""

    def score_all(contexts: Tensor) -> Tensor:
        scores = users[contexts] @ items.t()
        scores[:, 0] = -torch.inf
        return scores

    return RowRanking(score_all, len(items))


def check(
    found: Tensor, contexts: Tensor, users: Tensor, items: Tensor, without: Seen | None = None
) -> None:
    """Check lists: distinct items, none left out, with the scores of a full sort in float64."""
    n, k = found.shape
    assert n == len(contexts)
    scores = users[contexts].double() @ items.double().t()
    scores[:, 0] = -torch.inf
    if without is not None:
        scores[without.cells(contexts)] = -torch.inf
    best = scores.sort(dim=1, descending=True).values[:, :k]
    # The rounding error of a product, relative to the product of the norms.
    size = users[contexts].double().norm(dim=1, keepdim=True) * items.double().norm(dim=1)[found]
    own = scores.gather(1, found)
    listed = best > -torch.inf
    assert torch.equal(found != 0, listed)
    assert ((own - best).abs() <= 2e-6 * size)[listed].all()
    for row in found.tolist():
        real = [item for item in row if item]
        assert len(set(real)) == len(real)


def compare(users: Tensor, items: Tensor, k: int, without: Seen | None = None) -> Counted:
    """Check the lists of all users, and return which were ranked in which way."""
    fast = Counted(users, items)
    contexts = torch.arange(len(users))
    check(fast.top_k(contexts, k, without), contexts, users, items, without)
    return fast


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 20])
@pytest.mark.parametrize("n_users", [1, 31, 32, 33, 70])
def test_lists_of_random_tables(n_users: int, k: int) -> None:
    fast = compare(*tables(n_users=n_users), k)
    assert set(fast.by_candidates) == set(range(n_users))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.integers(160, 400))
def test_lists_of_tables_of_any_shape(seed: int, d: int, k: int, n_items: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "has_bfloat16_arithmetic", lambda: True)
        compare(*tables(seed, 3, n_items, d), k)


def test_ids_where_scores_are_distinct_whole_numbers() -> None:
    # One column, and user 1.0: scores are the numbers up to 700 in some order. bfloat16 has not all
    # of them.
    order = torch.randperm(N_ITEMS - 1) + 1
    items = torch.zeros(N_ITEMS, 1)
    items[order, 0] = torch.arange(N_ITEMS - 1, 0, -1).float()
    found = Counted(torch.ones(3, 1), items).top_k(torch.arange(3), 21)
    assert (found == order[:21]).all()


def test_the_contexts_are_taken_as_they_come() -> None:
    users, items = tables()
    contexts = torch.tensor([7, 3, 7, 39, 0])
    fast = Counted(users, items)
    check(fast.top_k(contexts, 9), contexts, users, items)
    assert torch.equal(fast.top_k(contexts.int(), 9), fast.top_k(contexts, 9))


@pytest.mark.parametrize("unseen", [False, True])
def test_no_contexts(unseen: bool) -> None:
    users, items = tables()
    seen = seen_of([(1, 2)], N_USERS, N_ITEMS) if unseen else None
    assert Counted(users, items).top_k(torch.zeros(0, dtype=torch.int64), 5, seen).shape == (0, 5)


def test_norms_over_six_orders_of_magnitude() -> None:
    users, items = tables()
    sizes = 10.0 ** torch.linspace(-3, 3, N_ITEMS)[torch.randperm(N_ITEMS)].unsqueeze(1)
    compare(users, items * sizes, 15)
    compare(users * 10.0 ** torch.linspace(-3, 3, N_USERS).unsqueeze(1), items, 15)


def test_scores_that_are_all_negative_are_ranked_from_rows() -> None:
    users, items = (table.abs() for table in tables())
    fast = compare(-users, items, 5)
    assert sorted(fast.from_rows) == list(range(N_USERS))


def test_scores_of_which_few_are_positive() -> None:
    users, items = (table.abs() for table in tables())
    items[-3:] *= -1.0  # three positive scores, but five items are asked for
    compare(-users, items, 5)


def test_equal_scores() -> None:
    users = torch.ones(34, 3)
    compare(users, torch.ones(N_ITEMS, 3), 20)
    compare(users, torch.zeros(N_ITEMS, 3), 20)
    # Two values: the 10 items with the better one are all in the list.
    items = torch.ones(N_ITEMS, 3)
    items[100:110] = 1.0 + 2.0**-20
    assert sorted(Counted(users, items).top_k(torch.arange(1), 10)[0].tolist()) == list(
        range(100, 110)
    )


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-25, 1e-20, 1e-12, 1e12, 1e17, 1e18])
@pytest.mark.parametrize("which", ["users", "items", "both"])
def test_tiny_and_huge_scales(scale: float, which: str) -> None:
    """Norms and products that underflow in half precision, or in the squares of the norm."""
    users, items = tables()
    if which == "both":
        scale = max(scale, 1e-18)  # below that the scores are no normal float32 numbers
        compare(users * scale, items * scale, 6)
    else:
        compare(
            users * (scale if which == "users" else 1.0),
            items * (scale if which == "items" else 1.0),
            6,
        )


@pytest.mark.parametrize(
    ("user_scale", "item_scale"), [(1e20, 1e-20), (1e-25, 1e25), (1e25, 1e-25), (1e-37, 1e37)]
)
def test_scales_that_cancel(user_scale: float, item_scale: float) -> None:
    users, items = tables()
    compare(users * user_scale, items * item_scale, 6)


def test_small_items_beside_others() -> None:
    """Items so small that the squares in their norms are 0, with a user so large that they matter.

    They must be ranked correctly.
    """
    users, items = tables(d=300)
    items[::2] *= 1e-25
    items[1::2] = -items[1::2].abs()
    compare(users.abs() * 1e15, items, 6)


def test_padding_and_zero_rows() -> None:
    users, items = tables()
    users[0] = 0.0
    users[5] = 0.0
    items[0] = 1e12  # padding is never listed, and does not influence the others
    items[::7] = 0.0
    items[0] = 1e12
    fast = compare(users, items, 12)
    assert set(fast.from_rows) == {0, 5}  # all their scores are 0
    assert (fast.top_k(torch.arange(N_USERS), 12) != 0).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e38])
def test_a_padding_item_of_any_kind_is_never_listed(value: float) -> None:
    users, items = tables()
    items[0] = value
    found = Counted(users, items).top_k(torch.arange(N_USERS), 12)
    items[0] = 0.0
    check(found, torch.arange(N_USERS), users, items)


def test_negative_zero_ranks_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sign bit is the highest bit, and would change the order of a whole block."""
    users, items = torch.eye(2), torch.zeros(N_ITEMS, 2)
    items[40:50] = torch.arange(1.0, 11.0).unsqueeze(1)
    items[100, 1] = 1e-3

    def signed(*args: Tensor) -> Tensor:
        scores = scores_at(*args)
        return torch.where(scores == 1e-3, -0.0, scores)

    monkeypatch.setattr(ranking, "scores_at", signed)
    monkeypatch.setattr(ranking, "_COLUMNS", 1e3)  # all items are candidates
    # Nearly all of the 44 sampled items are above the threshold.
    monkeypatch.setattr(ranking, "_SPARE", (137.0,))
    found = Counted(users, items).top_k(torch.arange(2), 5)
    assert (found == torch.tensor([49, 48, 47, 46, 45])).all()


# -- what is not a number --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf, 1e38, -1e38])
@pytest.mark.parametrize("which", ["a user", "an item"])
def test_what_is_no_number_ranks_as_in_whole_rows(value: float, which: str) -> None:
    users, items = tables()
    if which == "a user":
        users[17, 3] = value
    else:
        items[321, 3] = value
    fast = Counted(users, items)
    found = fast.top_k(torch.arange(N_USERS), 8)
    assert torch.equal(found, by_rows(users, items).top_k(torch.arange(N_USERS), 8))
    if which == "a user":  # only this user is ranked from rows
        assert fast.from_rows == [17]


def test_overflow_of_some_scores_is_no_crash() -> None:
    users, items = tables()
    users[3], items[9] = 1e25, 1e25
    found = Counted(users, items).top_k(torch.arange(N_USERS), 8)
    assert torch.equal(found, by_rows(users, items).top_k(torch.arange(N_USERS), 8))
    assert found[3, 0] == 9


# -- without what was seen -------------------------------------------------------------------------


def test_the_seen_are_left_out() -> None:
    users, items = tables()
    best = by_rows(users, items).top_k(torch.arange(N_USERS), 30)
    pairs = [(user, item) for user in range(N_USERS) for item in best[user, ::2].tolist()]
    compare(users, items, 20, seen_of(pairs, N_USERS, N_ITEMS))


def test_users_who_have_seen_nearly_everything() -> None:
    users, items = tables()
    pairs = []
    for user, left in enumerate([0, 1, 3, 4, 5, 6, 40]):
        kept = {1 + (97 * j + user) % (N_ITEMS - 1) for j in range(left)}
        assert len(kept) == left
        pairs += [(user, item) for item in range(1, N_ITEMS) if item not in kept]
    seen = seen_of(pairs, N_USERS, N_ITEMS)
    compare(users, items, 5, seen)
    found = Counted(users, items).top_k(torch.arange(7), 5, seen)
    assert (found != 0).sum(1).tolist() == [0, 1, 3, 4, 5, 5, 5]
    assert torch.equal(found, by_rows(users, items).top_k(torch.arange(7), 5, seen))


# -- bounds, threshold and certificate -------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.integers(1, 400),
    st.floats(-18, 18),
    st.floats(-18, 18),
    st.sampled_from(["normal", "equal", "opposite", "one", "wide"]),
)
def test_bounds_are_not_below_the_scores(
    seed: int, d: int, left: float, right: float, kind: str
) -> None:
    draw = torch.Generator().manual_seed(seed)
    users, items = torch.randn(4, d, generator=draw), torch.randn(50, d, generator=draw)
    if kind in ("equal", "opposite"):  # all terms have one sign, so all roundings may add up
        users = users.abs()
        items = items.abs() * (1.0 if kind == "equal" else -1.0)
    elif kind == "one":  # all entries just above the middle between two bfloat16 numbers
        users, items = (
            torch.full((4, d), 1.0 + 2.0**-8 + 2.0**-20),
            torch.full((50, d), 1.0 + 2.0**-8 - 2.0**-20),
        )
    elif kind == "wide":
        users, items = (
            t * 10.0 ** (4 * torch.rand(t.shape, generator=draw) - 2) for t in (users, items)
        )
    # Powers of two change no rounding.
    users, items = users * 2.0 ** round(left * 3.3), items * 2.0 ** round(right * 3.3)
    bounds = bounds_of(users, items).double()
    scores = users.double() @ items.double().t()
    # The product is rounded too, which keeps the order. So only the comparison with a threshold, a
    # bfloat16 number, must be right. Scores below all thresholds need no certificate.
    below = torch.where(
        scores.bfloat16().double() > scores, before(scores.bfloat16()), scores.bfloat16()
    )
    claimed = scores >= torch.finfo(torch.bfloat16).tiny
    assert (bounds >= below.double())[claimed].all()
    sizes = users.double().norm(dim=1, keepdim=True) * items.double().norm(dim=1)
    # The bounds are not far above the scores either. Two roundings of relative size 2^-8 count
    # twice (the columns add what they may take), the rounding of the product once, and there is a
    # little for the columns.
    sizes = users.double().norm(dim=1, keepdim=True) * items.double().norm(dim=1)
    if min(users.norm(dim=1).min(), items.norm(dim=1).min()) > ranking._SMALLEST_NORM:
        assert (bounds - scores <= 5.2 * 2.0**-8 * sizes).all()


def bounds_of(users: Tensor, items: Tensor) -> Tensor:
    return (
        ranking._with_norms(users, of_contexts=True)
        @ ranking._with_norms(items, of_contexts=False).t()
    )


def before(positive: Tensor) -> Tensor:
    """The bfloat16 number before each."""
    return (positive.view(torch.int16) - 1).view(torch.bfloat16)


def unlucky() -> tuple[Tensor, Tensor]:
    """A case in which all roundings lower the score of item 7, the best one.

    Item 5 is the second best, and item 16 gives the threshold. 1 + 2^-8 is halfway between two
    bfloat16 numbers: ``down`` and ``up`` are rounded away from it.
    """
    down, up = 1.0 + 2.0**-8 - 2.0**-20, 1.0 + 2.0**-8 + 2.0**-20
    users, items = torch.tensor([[down, up / 2, up / 2]]), torch.zeros(N_ITEMS, 3)
    items[7] = torch.tensor([down, -up / 2, -up / 2])
    items[5, 0] = 0.501947
    items[16, 0] = 0.5
    return users, items


@pytest.mark.parametrize(
    ("left", "right"), [(0, 0), (50, -83), (-83, 50), (-30, -30), (-60, -60), (30, 30)]
)
def test_the_best_item_is_found_with_all_roundings_against_it(left: int, right: int) -> None:
    """At any scale. A bound with only 1/160 of the product of the norms would be too low."""
    users, items = unlucky()
    scores = (users.double() @ items.double().t())[0]
    assert scores.topk(2).indices.tolist() == [7, 5]
    assert Counted(users * 2.0**left, items * 2.0**right).top_k(torch.arange(1), 1).tolist() == [
        [7]
    ]


def test_without_the_two_columns_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then the certificate is wrong."""
    monkeypatch.setattr(ranking, "_COLUMNS", 0.0)
    assert Counted(*unlucky()).top_k(torch.arange(1), 1).tolist() == [[5]]


def test_both_ways_are_taken() -> None:
    users, items = tables()
    users[11] = 0.0
    fast = compare(users, items, 12)
    assert set(fast.by_candidates) == set(range(N_USERS))
    assert fast.from_rows == [11]


def test_who_fails_is_tried_again_with_more() -> None:
    users, items = tables()
    fast = Counted(users, items)
    # Every 16th item is sampled, and these are the best of all. So the threshold is too high, and
    # there are too few candidates.
    direction = torch.zeros(WIDTH)
    direction[0] = 1.0
    users = direction.expand(3, WIDTH)
    items[:, 0] = torch.rand(N_ITEMS)
    items[::16, 0] += 5.0
    fast = compare(users, items, 20)
    assert len(fast.by_candidates) > 3


def test_scores_that_half_precision_cannot_tell_apart() -> None:
    users, items = torch.ones(1, 1), torch.zeros(N_ITEMS, 1)
    items[:, 0] = 1.0 + torch.arange(N_ITEMS) * 2.0**-20
    best = list(range(N_ITEMS - 1, N_ITEMS - 6, -1))
    assert (users.bfloat16() @ items.bfloat16().t())[0].topk(5).indices.tolist() != best
    assert Counted(users, items).top_k(torch.arange(1), 5)[0].tolist() == best


@pytest.mark.parametrize("spare", [(0.01,), (0.01, 0.02), (1e-9, 1e-9, 1e-9)])
def test_thresholds_that_are_too_high_get_no_certificate(
    monkeypatch: pytest.MonkeyPatch, spare: tuple[float, ...]
) -> None:
    """If the best sampled item gives the threshold, few items reach it.

    Users with too few of them are ranked from rows.
    """
    monkeypatch.setattr(ranking, "_SPARE", spare)
    users, items = tables()
    fast = compare(users, items, 21)
    assert len(fast.from_rows) > N_USERS // 4
    assert len(fast.from_rows) < N_USERS


def test_bounds_that_are_far_too_high_are_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there are enough candidates, but their exact scores do not reach the threshold."""
    monkeypatch.setattr(ranking, "_COLUMNS", 100.0)
    fast = compare(*tables(), 20)
    assert fast.from_rows


# -- when the fast way is used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_items", "expected"), [(5 * 32 - 1, False), (5 * 32, True), (5 * 32 + 1, True)]
)
def test_small_catalogues_are_ranked_from_rows(n_items: int, expected: bool) -> None:
    assert ranking._WORTHWHILE == 32
    fast = compare(*tables(n_items=n_items), 5)
    assert bool(fast.by_candidates) is expected


def test_lists_longer_than_the_catalogue() -> None:
    users, items = tables(n_items=4)
    assert torch.equal(
        Counted(users, items).top_k(torch.arange(3), 9),
        by_rows(users, items).top_k(torch.arange(3), 9),
    )


@pytest.mark.parametrize("unseen", [False, True])
def test_processors_without_the_arithmetic_list_the_same(
    monkeypatch: pytest.MonkeyPatch, unseen: bool
) -> None:
    users, items = tables()
    seen = seen_of(
        [(u, 1 + (7 * u + j) % 699) for u in range(N_USERS) for j in range(90)], N_USERS, N_ITEMS
    )
    found = Counted(users, items).top_k(torch.arange(N_USERS), 10, seen if unseen else None)
    monkeypatch.setattr(ranking, "has_bfloat16_arithmetic", lambda: False)
    slow = Counted(users, items)
    assert torch.equal(slow.top_k(torch.arange(N_USERS), 10, seen if unseen else None), found)
    assert not slow.by_candidates


def test_other_precisions_are_ranked_from_rows() -> None:
    users, items = tables()
    fast = Counted(users.double(), items.double())
    check(fast.top_k(torch.arange(N_USERS), 10), torch.arange(N_USERS), users, items)
    assert not fast.by_candidates


def test_whether_this_processor_has_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for answer in (True, False):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer, raising=False
        )
        assert ranking.has_bfloat16_arithmetic() is answer
    # A version of torch without this function
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert ranking.has_bfloat16_arithmetic() is False
