"""Repairs of RecBole 1.2.1 and of the libraries that it uses, one function for each fault.

`apply` makes all repairs that the installed libraries need. The rules: test for a feature, never
for a version; change as little as possible (RecBole's own methods rather than `pandas.Series`);
change nothing that works. Line numbers (file:line) refer to the installed `recbole` package.
"""

from __future__ import annotations

from collections.abc import Callable

from recbole_rcekd.compat import habits, processes, stack
from recbole_rcekd.compat.habits import add_model, without_anomaly_detection, without_tensorboard

__all__ = ["add_model", "apply", "without_anomaly_detection", "without_tensorboard"]

# The order matters: importing ray needs numpy's old names, and the functions from `pandas_fill_nan`
# on import RecBole.
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
    """Make RecBole 1.2.1 work with the installed libraries.

    Call it before anything imports `recbole.quick_start`. Calling it again changes nothing.
    """
    for mend in _QUIRKS:
        mend()
