"""FTD, pair by pair: the difference of two cosines, squared (KDD 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recbole_rcekd.core.types import Vectors
from recbole_rcekd.losses import FTDLoss


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """0 where one of the two is all 0."""
    product = 0.0
    for x, y in zip(left, right, strict=True):
        product += x * y
    lengths = math.hypot(*left) * math.hypot(*right)
    return product / lengths if lengths > 0 else 0.0


def batch_rows(*sides: Vectors | None) -> tuple[list[list[float]], list[list[float]]]:
    """The student's and the teacher's rows of the users and items in the batch."""
    student: list[list[float]] = []
    teacher: list[list[float]] = []
    for side in sides:
        if side is not None:
            student += side.student.tolist()[: side.n]
            teacher += side.teacher.tolist()[: side.n]
    return student, teacher


def ftd(student: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]]) -> float:
    total = 0.0
    for a in range(len(student)):
        for b in range(len(student)):
            total += (cosine(teacher[a], teacher[b]) - cosine(student[a], student[b])) ** 2
    return total


# --- for tests/losses/test_embedding_contract.py ---
SMALL: dict[str, Any] = {}
CASES: list[dict[str, Any]] = [{}]
WEIGHTED = False  # pairs


def value(users: Vectors | None, items: Vectors | None, loss: FTDLoss) -> float:
    return ftd(*batch_rows(users, items))
