"""Softmax cross-entropy of labels over all items, for one user; item 0 is padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.ce import softmax as probabilities
from tests.tables import User


def softmax(student: Sequence[float], positives: Sequence[int], tau: float) -> float:
    p = probabilities(student, range(1, len(student)), tau)
    return -sum(math.log(p[item]) for item in positives) / len(positives)


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"softmax_positives": 2}
CASES: list[dict[str, Any]] = [{}, {"softmax_positives": 3, "softmax_temperature": 2.0}]
NO_TEACHER = True


def value(user: User, settings: Mapping[str, Any]) -> float:
    return softmax(user.student, user.listed, settings.get("softmax_temperature", 1.0))
