"""CD for one user: binary cross-entropy with the teacher's soft label (ICDM 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.tables import User


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def cd(
    student: Sequence[float],
    teacher: Sequence[float],
    items: Sequence[int],
    scale: float,
    shift: float,
) -> float:
    loss = 0.0
    for item in items:
        label, p = sigmoid((teacher[item] + shift) / scale), sigmoid(student[item])
        loss -= label * math.log(p) + (1.0 - label) * math.log(1.0 - p)
    return loss


def duel_probabilities(n_pool: int, pool: int, temperature: float) -> list[float]:
    """The probability of each position to be the better of two that are drawn."""
    weights = [math.exp(-(r + 1) / (pool * temperature)) for r in range(n_pool)]
    won = [0.0] * n_pool
    for a, weight_a in enumerate(weights):
        for b, weight_b in enumerate(weights):
            won[min(a, b)] += weight_a * weight_b
    return [w / sum(won) for w in won]


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"cd_items": 6, "cd_pool": 12}
CASES: list[dict[str, Any]] = [{"cd_guide": guide} for guide in ("student", "teacher")]
RELATIVE = False  # each score alone


def value(user: User, settings: Mapping[str, Any]) -> float:
    return cd(user.student, user.teacher, user.listed, 2.0, 0.0)
