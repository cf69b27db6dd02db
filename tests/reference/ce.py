"""Soft cross-entropy on a top-K, for one user (RCE-KD, section 5, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.tables import User

Scores = Mapping[int, float] | Sequence[float]


def softmax(scores: Scores, items: Sequence[int], tau: float) -> dict[int, float]:
    total = 0.0
    for item in items:
        total += math.exp(scores[item] / tau)
    return {item: math.exp(scores[item] / tau) / total for item in items}


def soft_ce(student: Scores, teacher: Scores, items: Sequence[int], tau: float) -> float:
    p, q = softmax(student, items, tau), softmax(teacher, items, tau)
    loss = 0.0
    for item in items:
        loss -= q[item] * math.log(p[item])
    return loss


def ce(
    student: Scores, teacher: Scores, q_t: Sequence[int], q_s: Sequence[int], which: str, tau: float
) -> float:
    items = {"teacher": list(q_t), "student": list(q_s), "union": sorted({*q_t, *q_s})}[which]
    return soft_ce(student, teacher, items, tau)


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"ce_top_k": 5, "ce_temperature": 1.5}
CASES: list[dict[str, Any]] = [{"ce_items": items} for items in ("teacher", "student", "union")]


def value(user: User, settings: Mapping[str, Any]) -> float:
    return ce(
        user.student,
        user.teacher,
        user.teacher_top(5),
        user.student_top(5),
        settings["ce_items"],
        1.5,
    )
