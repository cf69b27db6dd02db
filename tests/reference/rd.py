"""RD for one user: each of the teacher's best as a positive, with two weights (KDD 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from tests.tables import User


def rd(
    student: Sequence[float],
    top: Sequence[int],
    samples: Sequence[int],
    n_items: int,
    *,
    scale: float,
    mu: float,
    started: bool,
    port: bool,
) -> float:
    positions = [math.exp(-r / scale) for r in range(len(top))]
    weights = [a / sum(positions) for a in positions]
    if started:
        for r, item in enumerate(top):
            higher = sum(student[sample] > student[item] for sample in samples)
            rank = (n_items - 1) * higher // len(samples) + (1 if port else 0)
            weights[r] *= max(0.0, math.tanh(mu * (rank - r)))
        if port:
            total = sum(weights)
            weights = [w / total if total else 0.0 for w in weights]
    return sum(
        w * math.log(1.0 + math.exp(-student[item])) for w, item in zip(weights, top, strict=True)
    )


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"rd_top_k": 4, "rd_samples": 7, "rd_start_epoch": 0}
CASES: list[dict[str, Any]] = [{"rd_weights": weights} for weights in ("original", "port")] + [
    {"rd_start_epoch": 1}
]
RELATIVE = False  # each score alone
ZERO = True  # where the student ranks no item too low
ORDERED = 4  # so many columns are in the teacher's order
TAIL = "rd_samples"  # the last columns, as many as this setting says


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    """The samples count once the student's ranks do."""
    assert sets.keep is not None
    counted = sets.keep.clone()
    if {**SMALL, **settings}["rd_start_epoch"] > 0:
        counted[:, 4:] = False
    return counted


def value(user: User, settings: Mapping[str, Any]) -> float:
    top, samples = [i for i in user.items[:4] if i], [i for i in user.items[4:] if i]
    return rd(
        user.student,
        top,
        samples,
        30,
        scale=1.0,
        mu=0.1,
        started=settings["rd_start_epoch"] == 0,
        port=settings.get("rd_weights") == "port",
    )
