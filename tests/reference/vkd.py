"""VkD for the rows of a batch: rotate each, and compare it with the teacher's (CVPR 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recbole_rcekd.core.types import Vectors
from tests.reference.fitnet import affine, of_length_1, squared_distance


def standardised(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each column to mean 0 and deviation 1."""
    columns = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in column) / len(column))
        columns.append([(x - mean) / (deviation + 1e-6) for x in column])
    return [list(row) for row in zip(*columns, strict=True)]


def orthonormal(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Gram–Schmidt of the columns, or of the rows where there are fewer of them."""
    if len(rows) < len(rows[0]):
        return [list(row) for row in zip(*orthonormal(list(zip(*rows, strict=True))), strict=True)]
    found: list[list[float]] = []
    for column in map(list, zip(*rows, strict=True)):
        for other in found:
            shared = sum(a * b for a, b in zip(column, other, strict=True))
            column = [a - shared * b for a, b in zip(column, other, strict=True)]
        found.append(of_length_1(column))
    return [list(row) for row in zip(*found, strict=True)]


# --- for tests/losses/test_embedding_contract.py ---
SMALL: dict[str, Any] = {}
CASES: list[dict[str, Any]] = [{"vkd_standardise": standardise} for standardise in (False, True)]


def value(users: Vectors | None, items: Vectors | None, loss: Any) -> float:
    matrix = orthonormal(loss.projector.tolist())
    total = 0.0
    for vectors in (users, items):
        if vectors is None:
            continue
        wanted = vectors.teacher.tolist()
        if loss.settings.vkd_standardise:
            wanted = standardised(wanted)
        for weight, s, t in zip(
            vectors.weights.tolist(), vectors.student.tolist(), wanted, strict=True
        ):
            total += weight * squared_distance(affine(s, matrix, [0.0] * len(matrix)), t)
    return total
