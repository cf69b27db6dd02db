"""Cross-entropy normalised over the whole catalogue, for one user; item 0 is padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.ce import softmax
from tests.tables import User


def fce(student: Sequence[float], teacher: Sequence[float], targets: Sequence[int], tau: float) -> float:
    catalogue = list(range(1, len(student)))
    p, q = softmax(student, catalogue, tau), softmax(teacher, targets, tau)
    loss = 0.0
    for item in targets:
        loss -= q[item] * math.log(p[item])
    return loss


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"fce_top_k": 5}
CASES: list[dict[str, Any]] = [{"fce_target": target} for target in ("all", "teacher")]


def value(user: User, settings: Mapping[str, Any]) -> float:
    return fce(
        user.student, user.teacher, range(1, 31) if settings["fce_target"] == "all" else user.teacher_top(5), 1.0
    )
