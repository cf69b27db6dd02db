"""RCE-KD for one user, with Python sets and floats.

The paper's steps 1 to 6, or the authors' code where a mode is ``code``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from tests.reference.ce import Scores, soft_ce
from tests.tables import User


def votes(pool: Sequence[int], q_t: Sequence[int], q_s: Sequence[int], mode: str) -> list[int]:
    """z of each item of the student's top-M, best first."""
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
    q_t: Sequence[int],
    q_s: Sequence[int],
    samples: Sequence[int],
    mode: str,
    beta: float,
    value: float,
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


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"rce_top_k": 5, "rce_samples": 4, "rce_pool": 10, "rce_beta": 1.0}
CASES: list[dict[str, Any]] = [
    *({"rce_terms": terms} for terms in ("full", "l1", "l2", "no_split")),
    {"rce_gamma": "code", "rce_votes": "code", "rce_temperature": 2.0},
    {"rce_gamma": "constant", "rce_samples": 0},
    {"rce_sampling_temperature": "auto"},
]
BLOCKS = (5,)  # the student's top-K, and the rest


def value(user: User, settings: Mapping[str, Any]) -> float:
    return value_with(user, settings, user.teacher, [])


def value_with(
    user: User, settings: Mapping[str, Any], teacher: Scores, more: Sequence[int]
) -> float:
    """The loss with these teacher scores, and with ``more`` items beside the samples."""
    q_t, q_s = user.teacher_top(5), user.student_top(5)
    samples = user.items[5 : 5 + settings["rce_samples"]]
    mixing = gamma(q_t, q_s, samples, settings.get("rce_gamma", "paper"), 1.0, 0.5)
    tau, terms = settings.get("rce_temperature", 1.0), settings.get("rce_terms", "full")
    return rce(user.student, teacher, q_t, q_s, [*samples, *more], mixing, tau, terms)


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    """The first term has no mask; an ablation leaves out one of the terms."""
    terms = settings.get("rce_terms")
    assert sets.keep is not None
    first = torch.full((len(sets.items), 5), terms != "l2")
    return torch.cat([first, sets.keep & (terms != "l1")], dim=1)
