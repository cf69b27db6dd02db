"""ListMLE for one user: the probability of picking the top-K in its order (ICML 2008)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.reference.rrd import rrd
from tests.tables import User

# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"listmle_top_k": 5}
CASES: list[dict[str, Any]] = [{}]
ORDERED = 5  # all columns


def value(user: User, settings: Mapping[str, Any]) -> float:
    return rrd(user.student, user.teacher_top(settings["listmle_top_k"]), [])
