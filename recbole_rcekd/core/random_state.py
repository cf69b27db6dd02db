"""Drawing without changing the global random state, which RecBole's training uses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """After the block, restore the global random state and the cuDNN switches that RecBole sets."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    cudnn = torch.backends.cudnn
    switches = cudnn.deterministic, cudnn.benchmark
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        cudnn.deterministic, cudnn.benchmark = switches
