"""RCE-KD for one user, with Python sets and floats: the paper's steps 1–6; the authors' code where a mode says so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.ce import Scores, soft_ce


def votes(pool: Sequence[int], q_t: Sequence[int], q_s: Sequence[int], mode: str) -> list[int]:
    """z of each item of the student's list, best first; teacher items beyond the list would add a constant."""
    missed = [item for item in q_t if item not in q_s]
    z = []
    for place in range(len(pool)):
        count = 0
        for other, item in enumerate(pool):
            if mode == "paper" and item in missed and other > place:
                count += 1
            if mode == "code" and item in q_t and other >= place:
                count += 1
        z.append(min(count, 50) if mode == "code" else count)
    return z


def gamma(
    q_t: Sequence[int], q_s: Sequence[int], samples: Sequence[int], mode: str, beta: float, value: float
) -> float:
    if mode == "constant":
        return value
    other = samples if mode == "code" else q_s
    shared = 0
    for item in q_t:
        if item in other:
            shared += 1
    return math.exp(-beta * shared / len(q_t))


def rce(
    student: Scores,
    teacher: Scores,
    q_t: Sequence[int],
    q_s: Sequence[int],
    samples: Sequence[int],
    mixing: float,
    tau: float,
    terms: str,
) -> float:
    if terms == "no_split":
        return soft_ce(student, teacher, sorted({*q_t, *q_s, *samples}), tau)
    l1 = soft_ce(student, teacher, q_s, tau)
    l2 = soft_ce(student, teacher, sorted({*(set(q_t) - set(q_s)), *samples}), tau)
    if terms == "l1":
        return l1
    if terms == "l2":
        return l2
    return (1.0 - mixing) * l1 + mixing * l2
