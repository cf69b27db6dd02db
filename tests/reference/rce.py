"""RCE-KD for one user, with Python sets and floats: the paper's steps 1–6; the authors' code where a mode says so."""

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


def target_weight(
    item: int,
    popularity: int,
    ranked: Sequence[int],
    seen: Sequence[int],
    settings: Mapping[str, Any],
) -> float:
    """What the teacher's probability of an item is multiplied with; ``ranked`` is the student's list of all items."""
    weight = (popularity + 1) ** -settings.get("rce_popularity_tilt", 0.0)
    rank = min(ranked.index(item) + 1, settings["rce_pool"] + 1)
    place = (rank - settings["rce_top_k"]) / settings.get("rce_rank_boost_scale", 10.0)
    weight *= 1.0 + settings.get("rce_rank_boost", 0.0) / (1.0 + math.exp(-place))
    if item in seen:
        weight *= 1.0 + settings.get("rce_history_boost", 0.0)
    return float(weight)


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"rce_top_k": 5, "rce_samples": 4, "rce_pool": 10, "rce_beta": 1.0}
BOOSTS: dict[str, Any] = {
    "rce_rank_boost": 2.0,
    "rce_rank_boost_scale": 3.0,
    "rce_history_boost": 0.5,
}
CASES: list[dict[str, Any]] = [
    *({"rce_terms": terms} for terms in ("full", "l1", "l2", "no_split")),
    {"rce_gamma": "code", "rce_votes": "code", "rce_temperature": 2.0},
    {"rce_gamma": "constant", "rce_samples": 0},
    {"rce_sampling_temperature": "auto"},
    {"rce_tail_samples": 3, "rce_popularity_tilt": 0.5, "rce_temperature": 2.0},
    {"rce_tail_samples": 3, "rce_terms": "no_split", **BOOSTS},
]
BLOCKS = (5,)  # the student's top-K, and the rest


def value(user: User, settings: Mapping[str, Any]) -> float:
    q_t, q_s = user.teacher_top(5), user.student_top(5)
    n_samples = settings["rce_samples"]
    samples = user.items[5 : 5 + n_samples]
    tail = [
        item for item in user.items[5 + n_samples :][: settings.get("rce_tail_samples", 0)] if item
    ]
    mixing = gamma(q_t, q_s, samples, settings.get("rce_gamma", "paper"), 1.0, 0.5)
    tau, terms = settings.get("rce_temperature", 1.0), settings.get("rce_terms", "full")
    everyones, ranked = user.world.seen.ids.tolist(), user.student_top(len(user.student))
    teacher = {
        item: user.teacher[item]
        + tau * math.log(target_weight(item, everyones.count(item), ranked, user.seen, settings))
        for item in ranked
    }
    return rce(user.student, teacher, q_t, q_s, [*samples, *tail], mixing, tau, terms)


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    """The first term has no mask; an ablation leaves one of the two out."""
    terms = settings.get("rce_terms")
    assert sets.keep is not None
    first = torch.full((len(sets.items), 5), terms != "l2")
    return torch.cat([first, sets.keep & (terms != "l1")], dim=1)
