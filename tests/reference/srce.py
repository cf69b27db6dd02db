"""SRCE-KD for one user: RCE-KD with uniform samples and with weights on the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from tests.reference import rce
from tests.tables import User


def target_weight(
    item: int,
    popularity: int,
    ranked: Sequence[int],
    seen: Sequence[int],
    settings: Mapping[str, Any],
) -> float:
    """The factor of the teacher's probability; ``ranked`` are all items in the student's order."""
    weight = (popularity + 1) ** -settings["srce_popularity_tilt"]
    rank = min(ranked.index(item) + 1, settings["srce_pool"] + 1)
    place = (rank - settings["srce_top_k"]) / settings.get("srce_rank_boost_scale", 10.0)
    weight *= 1.0 + settings.get("srce_rank_boost", 0.0) / (1.0 + math.exp(-place))
    if item in seen:
        weight *= 1.0 + settings.get("srce_history_boost", 0.0)
    return float(weight)


def as_rce(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under RCE-KD's keys."""
    return {f"rce_{key.removeprefix('srce_')}": setting for key, setting in settings.items()}


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {
    "srce_top_k": 5,
    "srce_samples": 4,
    "srce_pool": 10,
    "srce_beta": 1.0,
    "srce_tail_samples": 3,
    "srce_popularity_tilt": 0.5,
}
BOOSTS: dict[str, Any] = {
    "srce_rank_boost": 2.0,
    "srce_rank_boost_scale": 3.0,
    "srce_history_boost": 0.5,
}
CASES: list[dict[str, Any]] = [
    *({"srce_terms": terms} for terms in ("full", "l1", "l2", "no_split")),
    {"srce_gamma": "code", "srce_votes": "code", "srce_temperature": 2.0},
    {"srce_gamma": "constant", "srce_samples": 0, "srce_sampling_temperature": "auto"},
    {"srce_terms": "no_split", "srce_popularity_tilt": 0.0, **BOOSTS},
    {"srce_tail_samples": 0, "srce_temperature": 2.0, **BOOSTS},
]
BLOCKS = (5,)  # the student's top-K, and the rest


def value(user: User, settings: Mapping[str, Any]) -> float:
    tail = [item for item in user.items[10 + settings["srce_samples"] :] if item]
    tau, popularity = settings.get("srce_temperature", 1.0), user.world.seen.ids.tolist()
    ranked = user.student_top(len(user.student))
    teacher = {
        item: user.teacher[item]
        + tau * math.log(target_weight(item, popularity.count(item), ranked, user.seen, settings))
        for item in ranked
    }
    return rce.value_with(user, as_rce(settings), teacher, tail)


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    return rce.support(as_rce(settings), sets)
