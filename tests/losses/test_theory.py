"""The bounds of METHODS.md, as inequalities that hold for any scores.

Gains are q = softmax(t) over J; ranks are the student's, in the whole catalogue. Equal scores share
the best rank of their group, and the worst too where the theorem covers it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.core.closure import closure_gap
from recbole_rcekd.core.functional import count_above, soft_cross_entropy
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.ce import CELoss, CESettings
from recbole_rcekd.losses.fce import FCELoss, FCESettings
from recbole_rcekd.training.diagnostics import closure_metrics
from tests.reference.ce import softmax

SLACK = 1e-9
# Scores with ties, at scales from 1e-2 to 1e2.
levels = st.integers(-3, 3)
scales = st.sampled_from([1e-2, 1e-1, 1.0, 10.0, 100.0])


@st.composite
def catalogues(draw: st.DrawFn, low: int = 2, high: int = 9) -> tuple[list[float], list[float]]:
    """Student and teacher scores of a small catalogue: on a grid (ties) or anywhere."""
    n = draw(st.integers(low, high))
    sides = []
    for _ in range(2):
        scale = draw(scales)
        unit = levels.map(float) if draw(st.booleans()) else st.floats(-3, 3)
        sides.append([scale * x for x in draw(st.lists(unit, min_size=n, max_size=n))])
    return sides[0], sides[1]


@st.composite
def subsets(draw: st.DrawFn, items: Sequence[int]) -> list[int]:
    """Some of the items, at least one."""
    return sorted(draw(st.sets(st.sampled_from(items), min_size=1)))


def ranks(student: Sequence[float], ties_against: bool = False) -> list[int]:
    """Ranks from 1; equal scores share the best rank of their group, or the worst."""
    found = []
    for score in student:
        above = 0
        for other in student:
            if other > score or (ties_against and other == score):
                above += 1
        found.append(above if ties_against else above + 1)
    return found


def minus_log_ndcg(gains: dict[int, float], rank: Sequence[int]) -> float:
    dcg = sum(gain / math.log2(1 + rank[item]) for item, gain in gains.items())
    ideal = sum(
        gain / math.log2(2 + k) for k, gain in enumerate(sorted(gains.values(), reverse=True))
    )
    return -math.log(dcg / ideal)


def row(x: Sequence[float]) -> Tensor:
    return torch.tensor([list(x)], dtype=torch.float64)


def cross_entropy(
    student: Sequence[float], teacher: Sequence[float], items: Sequence[int]
) -> float:
    s, t = ([x[i] for i in items] for x in (student, teacher))
    return soft_cross_entropy(row(s), row(t)).item()


def gap_and_ce(
    student: Sequence[float],
    teacher: Sequence[float],
    targets: Sequence[int],
    support: Sequence[int],
) -> tuple[float, float]:
    """Δ(A), and −Σ q̃ ln p^A over the targets, with our functions."""
    target_scores, support_scores = (
        row([student[i] for i in targets]),
        row([student[i] for i in support]),
    )
    probs = row([teacher[i] for i in targets]).softmax(-1)
    gap = closure_gap(
        probs, target_scores, count_above(target_scores, row(student)), support_scores
    )
    ce = -(probs * (target_scores - support_scores.logsumexp(-1, keepdim=True))).sum()
    return gap.item(), ce.item()


@given(catalogues())
def test_t1_full_cross_entropy_bounds_ndcg(scores: tuple[list[float], list[float]]) -> None:
    student, teacher = scores
    everything = range(len(student))
    gains = softmax(teacher, everything, 1.0)
    padded = torch.cat([torch.zeros(1, 1, dtype=torch.float64), row(student)], 1)
    sets = ItemSets(
        torch.zeros(1, 0).long(),
        torch.cat([torch.zeros(1, 1, dtype=torch.float64), row(teacher)], 1),
    )
    loss = FCELoss(FCESettings(fce_target="all")).forward(padded, sets).item()
    for ties_against in (False, True):
        assert minus_log_ndcg(gains, ranks(student, ties_against)) <= loss + SLACK


@given(catalogues())
def test_t1_link_by_link(scores: tuple[list[float], list[float]]) -> None:
    student, teacher = scores
    everything = range(len(student))
    q, p, rank = (
        softmax(teacher, everything, 1.0),
        softmax(student, everything, 1.0),
        ranks(student, True),
    )
    ideal = sum(gain / math.log2(2 + k) for k, gain in enumerate(sorted(q.values(), reverse=True)))
    dcg = sum(q[i] / math.log2(1 + rank[i]) for i in everything)
    assert ideal <= 1 + SLACK  # so NDCG ≥ DCG
    jensen = sum(q[i] * math.log(math.log2(1 + rank[i])) for i in everything)
    assert -math.log(dcg) <= jensen + SLACK
    assert all(math.log2(1 + r) <= r for r in rank)
    assert all(rank[i] * p[i] <= 1 + SLACK for i in everything)  # rank ≤ 1/p, ties included


@given(catalogues())
def test_t2_cross_entropy_on_a_prefix_of_the_students_ranking(
    scores: tuple[list[float], list[float]],
) -> None:
    student, teacher = scores
    order = sorted(range(len(student)), key=lambda i: -student[i])
    # With ties in this order, the prefixes are closed.
    rank = {item: place + 1 for place, item in enumerate(order)}
    places = [rank[i] for i in range(len(student))]
    for length in range(1, len(order) + 1):
        closed = order[:length]
        gains = softmax(teacher, closed, 1.0)
        assert minus_log_ndcg(gains, places) <= cross_entropy(student, teacher, closed) + SLACK


@pytest.mark.parametrize(
    ("rank", "missing"), [(2, 0.4606), (3, 0.6931), (10, 1.2411), (100, 1.8959)]
)
def test_t2_fails_without_closure(rank: int, missing: float) -> None:
    # J = {i} at rank r: the cross-entropy is 0 whatever the student does, and −ln NDCG_J = ln
    # log2(1 + r).
    student = [float(-place) for place in range(rank)]
    target = rank - 1
    assert cross_entropy(student, student, [target]) == 0.0
    lost = minus_log_ndcg({target: 1.0}, ranks(student))
    assert lost == pytest.approx(math.log(math.log2(1 + rank)), abs=1e-12)
    assert lost == pytest.approx(missing, abs=1e-4)
    # The closure gap makes up for it: Δ = ln r, which is at least as large.
    gap, _ = gap_and_ce(student, student, [target], [target])
    assert gap == pytest.approx(math.log(rank), abs=1e-12)
    assert gap >= lost


@given(catalogues(), st.data())
def test_t3_cross_entropy_and_closure_gap_bound_ndcg_on_any_set(
    scores: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    student, teacher = scores
    support = data.draw(subsets(range(len(student))))
    targets = data.draw(subsets(support))
    gap, ce = gap_and_ce(student, teacher, targets, support)
    gains = softmax(teacher, targets, 1.0)
    assert gap >= 0
    assert minus_log_ndcg(gains, ranks(student)) <= ce + gap + SLACK
    # The two terms together are Σ q̃ ln(1/p + m).
    p = softmax(student, support, 1.0)
    assume(min(p.values()) > 1e-250)
    total = 0.0
    for item in targets:
        blockers = sum(student[j] > student[item] for j in range(len(student)) if j not in support)
        total += gains[item] * math.log(1 / p[item] + blockers)
    assert ce + gap == pytest.approx(total, rel=1e-9, abs=1e-9)


@given(catalogues(), st.data())
def test_the_gap_is_0_exactly_when_no_blocker_is_missing(
    scores: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    student, teacher = scores
    everything = list(range(len(student)))
    targets = data.draw(subsets(everything))
    support = sorted({*targets, *data.draw(subsets(everything))})
    assert gap_and_ce(student, teacher, targets, everything)[0] == 0.0  # Δ(I) = 0
    highest = min(student[i] for i in targets)
    closed = sorted({*targets, *(j for j in everything if student[j] > highest)})
    assert gap_and_ce(student, teacher, targets, closed)[0] == 0.0
    missing = any(student[j] > student[i] for i in targets for j in everything if j not in support)
    gap, _ = gap_and_ce(student, teacher, targets, support)
    p, q = softmax(student, support, 1.0), softmax(teacher, targets, 1.0)
    assume(all(p[i] * q[i] > 1e-12 for i in targets))  # else it is 0 in floating point
    assert (gap > 0) == missing


@given(catalogues(), st.data())
def test_a_mask_of_the_support_is_the_smaller_support(
    scores: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    student, teacher = scores
    everything = range(len(student))
    support = data.draw(subsets(everything))
    targets = data.draw(subsets(support))
    probs, target_scores = (
        row([teacher[i] for i in targets]).softmax(-1),
        row([student[i] for i in targets]),
    )
    above = count_above(target_scores, row(student))
    keep = torch.tensor([[i in support for i in everything]])
    masked = closure_gap(probs, target_scores, above, row(student), keep)
    assert masked.item() == pytest.approx(
        gap_and_ce(student, teacher, targets, support)[0], abs=1e-12
    )


@given(catalogues(low=3), st.data())
def test_a_full_normaliser_bounds_ndcg_of_the_teachers_top_k(
    scores: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    # P5: T3 with A = I, as the loss.
    student, teacher = scores
    n = len(student)
    k = data.draw(st.integers(1, n - 1))
    top = sorted(range(n), key=lambda i: -teacher[i])[:k]
    padded = torch.cat([torch.full((1, 1), 1e3, dtype=torch.float64), row(student)], 1)
    sets = ItemSets(torch.tensor([top]) + 1, row([teacher[i] for i in top]))
    loss = FCELoss(FCESettings(fce_top_k=k)).forward(padded, sets).item()
    for ties_against in (False, True):
        assert (
            minus_log_ndcg(softmax(teacher, top, 1.0), ranks(student, ties_against)) <= loss + SLACK
        )


@given(catalogues(), st.data())
def test_t3_the_items_that_best_close_a_set_are_the_students_best(
    scores: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    student, teacher = scores
    targets = data.draw(
        st.lists(st.sampled_from(range(len(student))), min_size=1, max_size=3, unique=True)
    )
    others = sorted(set(range(len(student))) - set(targets), key=lambda i: -student[i])
    n = data.draw(st.integers(0, min(3, len(others))))
    best, _ = gap_and_ce(student, teacher, targets, [*targets, *others[:n]])
    for added in itertools.combinations(others, n):
        gap, _ = gap_and_ce(student, teacher, targets, [*targets, *added])
        assert best <= gap + SLACK


@given(catalogues(), st.sampled_from([0.5, 1.0, 10.0]), st.data())
def test_the_reported_gap_closes_the_bound_at_any_temperature(
    scores: tuple[list[float], list[float]], tau: float, data: st.DataObject
) -> None:
    student, teacher = scores
    items = torch.tensor([[i + 1 for i in data.draw(subsets(range(len(student))))]])
    rows, of_teacher = (
        torch.cat([torch.full((1, 1), -torch.inf).double(), row(x)], 1) for x in (student, teacher)
    )
    loss = CELoss(CESettings(ce_temperature=tau))
    sets = ItemSets(items, of_teacher.gather(1, items), torch.ones_like(items, dtype=torch.bool))
    ce = loss.forward(rows.gather(1, items), sets).item()
    gains = softmax(teacher, (items[0] - 1).tolist(), tau)
    assert (
        minus_log_ndcg(gains, ranks(student))
        <= ce + closure_metrics(loss, sets, rows)["closure_gap"] + SLACK
    )


def test_a_user_without_teacher_items_has_no_closure_gap() -> None:
    loss = CELoss(CESettings())
    items = torch.tensor([[2], [0]])
    sets = ItemSets(items, torch.zeros(2, 1), items != 0)
    rows = torch.tensor([[-torch.inf, 1.0, 0.0]] * 2)
    assert closure_metrics(loss, sets, rows) == {"closure_gap": pytest.approx(math.log(2))}
