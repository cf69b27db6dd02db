"""What all tests share: repairs of RecBole before its import, seeds, and the authors' numbers."""

from __future__ import annotations

import recbole_rcekd  # noqa: F401  (applies recbole_rcekd.compat before anything imports recbole)

# isort: split
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from tests.tables import Golden, read_golden

# The same examples in every run, and no time limits: other processes share the machine.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, max_examples=60
)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden" / "authors_golden.npz",
        help="the authors' numbers (.npz) that the losses are compared with",
    )


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The authors' numbers; see tests/golden/README.md."""
    return read_golden(request.config.getoption("--golden"))


@pytest.fixture(autouse=True)
def _fixed_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest's command line, which RecBole's Config reads, and fix all seeds."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (RecBole draws from the legacy state)
    torch.manual_seed(0)
    # Importing RecBole's SINE turns anomaly detection on for the whole process (sine.py:25).
    torch.autograd.set_detect_anomaly(False)
