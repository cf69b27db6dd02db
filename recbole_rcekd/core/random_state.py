"""The global random streams, which are RecBole's: what is drawn beside its training must not shift them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn or seeded inside leaves the global random streams, and RecBole's switches of cuDNN, as they were."""
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
