"""Cross-entropy over all items with the weights of SL@K, for one user; item 0 is padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.cd import sigmoid
from tests.reference.ce import softmax
from tests.tables import User


def slk(
    student: Sequence[float],
    teacher: Sequence[float],
    targets: Sequence[int],
    border: float,
    tau: float,
    tau_w: float,
) -> float:
    p, q = softmax(student, range(1, len(student)), tau), softmax(teacher, targets, tau)
    loss = 0.0
    for item in targets:
        loss -= q[item] * sigmoid((student[item] - border) / tau_w) * math.log(p[item])
    return loss


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"slk_top_k": 5, "slk_cut": 4}
CASES: list[dict[str, Any]] = [{}, {"slk_temperature": 2.0, "slk_cut_temperature": 0.5}]
CONSTANTS = True  # the weights


def value(user: User, settings: Mapping[str, Any]) -> float:
    tau, tau_w = settings.get("slk_temperature", 1.0), settings.get("slk_cut_temperature", 1.0)
    border = user.student[user.student_top(4)[-1]]
    return slk(user.student, user.teacher, user.teacher_top(5), border, tau, tau_w)
