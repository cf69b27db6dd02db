"""The RCE-KD authors' DCD for one user: weights by the student's ranks among all items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.rrd import rrd
from tests.tables import User


def weights(
    student: Sequence[float], top: Sequence[int], temperature: float
) -> tuple[list[float], list[float]]:
    """e⁺ and e⁻ of each item of the teacher's top-P; item 0 is padding."""
    under, over = [], []
    for place, item in enumerate(top):
        rank = sum(score > student[item] for score in student[1:])
        under.append(max(1e-5, math.tanh(max(0.0, (rank - place) / temperature))))
        over.append(max(1e-5, math.tanh(max(0.0, (place - rank) / temperature))))
    return under, over


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"dcd_port_items": 4, "dcd_port_pool": 12}
CASES: list[dict[str, Any]] = [{}]
ORDERED = 4  # so many columns are in the order to be learned
TAIL = "dcd_port_items"  # the last columns, as many as this setting says


def value(user: User, settings: Mapping[str, Any]) -> float:
    return rrd(user.student, [i for i in user.items[:4] if i], [i for i in user.items[4:] if i])
