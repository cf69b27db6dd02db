"""Soft cross-entropy on a short list, for one user, straight from the formula (RCE-KD, section 5, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


def ce(student: Scores, teacher: Scores, q_t: Sequence[int], q_s: Sequence[int], which: str, tau: float) -> float:
    items = {"teacher": list(q_t), "student": list(q_s), "union": sorted({*q_t, *q_s})}[which]
    return soft_ce(student, teacher, items, tau)
