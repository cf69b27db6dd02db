"""Cross-entropy normalised over the whole catalogue, for one user; item 0 is padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.ce import softmax


def fce(student: Sequence[float], teacher: Sequence[float], targets: Sequence[int], tau: float) -> float:
    catalogue = list(range(1, len(student)))
    p, q = softmax(student, catalogue, tau), softmax(teacher, targets, tau)
    loss = 0.0
    for item in targets:
        loss -= q[item] * math.log(p[item])
    return loss
