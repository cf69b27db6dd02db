"""Cross-entropy over all items, for one user; item 0 is padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.ce import softmax
from tests.tables import User


def fce(
    student: Sequence[float], teacher: Sequence[float], targets: Sequence[int], tau: float
) -> float:
    catalogue = list(range(1, len(student)))
    p, q = softmax(student, catalogue, tau), softmax(teacher, targets, tau)
    loss = 0.0
    for item in targets:
        loss -= q[item] * math.log(p[item])
    return loss


def sampled_fce(
    student: Sequence[float],
    teacher: Sequence[float],
    targets: Sequence[int],
    others: Sequence[int],
    tail: Sequence[int],
    n_items: int,
    tau: float,
) -> float:
    """With an estimated normaliser.

    ``others`` and the targets count once, each item of ``tail`` for its share of the remaining
    items.
    """
    certain = {*targets, *others}
    z = sum(math.exp(student[item] / tau) for item in certain)
    for item in tail:
        z += (n_items - len(certain)) / len(tail) * math.exp(student[item] / tau)
    q = softmax(teacher, targets, tau)
    return math.log(z) - sum(q[item] * student[item] / tau for item in targets)


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"fce_top_k": 5, "fce_samples": 6}
CASES: list[dict[str, Any]] = [
    *({"fce_target": target} for target in ("all", "teacher")),
    {"fce_normaliser": "sampled", "fce_temperature": 2.0},
]
BLOCKS = (10,)  # both top-K, and the sample
TAIL = "fce_samples"  # the last columns, as many as this setting says


def value(user: User, settings: Mapping[str, Any]) -> float:
    if "fce_normaliser" in settings:
        tail = [item for item in user.items[10:] if item]
        return sampled_fce(
            user.student, user.teacher, user.teacher_top(5), user.student_top(5), tail, 30, 2.0
        )
    return fce(
        user.student,
        user.teacher,
        range(1, 31) if settings["fce_target"] == "all" else user.teacher_top(5),
        1.0,
    )
