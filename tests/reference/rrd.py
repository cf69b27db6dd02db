"""RRD for one user: the probability of picking the interesting items in order (CIKM 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.tables import User


def rrd(
    student: Sequence[float], interesting: Sequence[int], uninteresting: Sequence[int]
) -> float:
    probability = 1.0
    for k, item in enumerate(interesting):
        total = 0.0
        for other in [*interesting[k:], *uninteresting]:
            total += math.exp(student[other])
        probability *= math.exp(student[item]) / total
    return -math.log(probability)


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"rrd_top_k": 4, "rrd_rest": 5, "rrd_pool": 9}
CASES: list[dict[str, Any]] = [{"rrd_sample": sample} for sample in (True, False)]
ORDERED = 4  # so many columns are in the order to be learned
TAIL = "rrd_rest"  # the last columns, as many as this setting says


def value(user: User, settings: Mapping[str, Any]) -> float:
    return rrd(user.student, [i for i in user.items[:4] if i], [i for i in user.items[4:] if i])
