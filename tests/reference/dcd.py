"""DCD for one user: which items of the teacher's top-P the student ranks wrongly (CIKM 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reference.rrd import rrd
from tests.tables import User


def corrections(
    student: Sequence[float], top: Sequence[int], temperature: float
) -> tuple[list[float], list[float]]:
    """e⁺ and e⁻ of each item of the teacher's top-P, by counting the items above it."""
    under, over = [], []
    for place, item in enumerate(top):
        rank = sum(student[other] > student[item] for other in top)
        under.append(math.tanh(max(0.0, (rank - place) / temperature)))
        over.append(math.tanh(max(0.0, (place - rank) / temperature)))
    return under, over


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"dcd_items": 4, "dcd_pool": 12, "dcd_item_weight": 0.0}
CASES: list[dict[str, Any]] = [{}]
ORDERED = 4  # so many columns are in the order to be learned
TAIL = "dcd_items"  # the last columns, as many as this setting says
ZERO = True  # where the student has the teacher's order


def value(user: User, settings: Mapping[str, Any]) -> float:
    return rrd(user.student, [i for i in user.items[:4] if i], [i for i in user.items[4:] if i])
