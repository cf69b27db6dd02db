"""FitNet for the rows of a batch: project each, and compare it with the teacher's (ICLR 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recbole_rcekd.core.types import Vectors

Matrix = Sequence[Sequence[float]]


def affine(x: Sequence[float], matrix: Matrix, shift: Sequence[float]) -> list[float]:
    return [
        sum(a * b for a, b in zip(row, x, strict=True)) + c
        for row, c in zip(matrix, shift, strict=True)
    ]


def of_length_1(x: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(a * a for a in x))
    return [a / length for a in x]


def squared_distance(x: Sequence[float], y: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


# --- for tests/losses/test_embedding_contract.py ---
SMALL: dict[str, Any] = {}
CASES: list[dict[str, Any]] = [
    {},
    {"fitnet_projector": "mlp"},
    {"fitnet_normalise": True},
    {"fitnet_projector": "mlp", "fitnet_normalise": True},
]


def value(users: Vectors | None, items: Vectors | None, loss: Any) -> float:
    total = 0.0
    for side, vectors in (("users", users), ("items", items)):
        if vectors is None:
            continue
        parts = [part.tolist() for part in loss.projectors[f"of_{side}"].parameters()]
        for weight, s, t in zip(
            vectors.weights.tolist(),
            vectors.student.tolist(),
            vectors.teacher.tolist(),
            strict=True,
        ):
            x = s
            if loss.settings.fitnet_projector == "mlp":
                x = [max(0.0, a) for a in affine(x, parts[0], parts[1])]
            x, y = affine(x, *parts[-2:]), t
            if loss.settings.fitnet_normalise:
                x, y = of_length_1(x), of_length_1(y)
            total += weight * squared_distance(x, y)
    return total
