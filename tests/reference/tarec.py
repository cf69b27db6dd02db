"""TARec for one user: the cost of moving the student's probabilities (WWW 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.ce import softmax
from tests.tables import User

Scores = Mapping[int, float] | Sequence[float]


def carried(have: Sequence[float], want: Sequence[float]) -> float:
    """Probability times distance in positions, moved from left to right until all is in place."""
    have, want = list(have), list(want)
    cost, i, j = 0.0, 0, 0
    while i < len(have) and j < len(want):
        amount = min(have[i], want[j])
        cost += amount * abs(i - j)
        have[i] -= amount
        want[j] -= amount
        if have[i] <= want[j]:
            i += 1
        else:
            j += 1
    return cost


def tarec(student: Scores, teacher: Scores, items: Sequence[int], tau: float) -> float:
    """``items``: each once, in the teacher's order."""
    p, q = softmax(student, items, tau), softmax(teacher, items, tau)
    return carried([p[item] for item in items], [q[item] for item in items])


def contrast(
    student: Sequence[Sequence[float]],
    teacher: Sequence[Sequence[float]],
    projection: Sequence[Sequence[float]],
    weights: Sequence[float],
    tau: float,
) -> float:
    """InfoNCE of projected embeddings among each other."""
    loss = 0.0
    for i, weight in enumerate(weights):
        projected = [sum(w * x for w, x in zip(row, student[i], strict=True)) for row in projection]
        alike = [math.exp(cosine(projected, other) / tau) for other in teacher]
        loss -= weight * math.log(alike[i] / sum(alike))
    return loss


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"tarec_top_k": 5}
CASES: list[dict[str, Any]] = [{"tarec_temperature": tau} for tau in (1.0, 2.5)]
ORDERED = 10  # all columns are in the teacher's order


def value(user: User, settings: Mapping[str, Any]) -> float:
    listed = user.teacher_top(5)
    union = listed + [item for item in user.student_top(5) if item not in listed]
    items = sorted(union, key=lambda item: -user.teacher[item])
    return tarec(user.student, user.teacher, items, settings["tarec_temperature"])
