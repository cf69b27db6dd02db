"""Every quirk of RecBole 1.2.1, and of what it stands on, one function each; `apply` mends what is broken where it runs.

The rules: look for the feature, never compare versions; patch the narrowest thing (RecBole's own
methods rather than `pandas.Series`); change nothing that works. Places (file:line) are inside the
installed `recbole` package.
"""

from __future__ import annotations

from collections.abc import Callable

from recbole_rcekd.compat import habits, processes, stack
from recbole_rcekd.compat.habits import add_model, without_anomaly_detection, without_tensorboard

__all__ = ["add_model", "apply", "without_anomaly_detection", "without_tensorboard"]

# In this order: importing ray needs numpy's old names, and from `pandas_fill_nan` on they import
# RecBole.
_QUIRKS: tuple[Callable[[], None], ...] = (
    stack.numpy_aliases,
    stack.ray_stub,
    stack.torch_load,
    stack.scipy_dok_update,
    stack.pandas_fill_nan,
    stack.pandas_agg_len,
    stack.stable_sort,
    stack.hyperopt_generator,
    habits.evaluation_counts,
    processes.distributed_without_gpu,
    processes.distributed_evaluation,
    processes.distributed_tensorboard,
)


def apply() -> None:
    """Make RecBole 1.2.1 work on the libraries that are installed; calling it again changes nothing.

    Call it before anything imports `recbole.quick_start`.
    """
    for mend in _QUIRKS:
        mend()
