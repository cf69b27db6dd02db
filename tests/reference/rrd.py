"""RRD for one user: the probability of picking the interesting items in order (CIKM 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rrd(student: Sequence[float], interesting: Sequence[int], uninteresting: Sequence[int]) -> float:
    probability = 1.0
    for k, item in enumerate(interesting):
        total = 0.0
        for other in [*interesting[k:], *uninteresting]:
            total += math.exp(student[other])
        probability *= math.exp(student[item]) / total
    return -math.log(probability)
