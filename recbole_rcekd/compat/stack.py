"""Repairs of RecBole 1.2.1 with current numpy, pandas, scipy, torch, ray and hyperopt.

RecBole sets no upper bound on numpy, pandas, scipy, torch or setuptools, so a plain install takes
the newest of each and fails at import; on pandas 3 some results are *silently* wrong.

Upstream threads about some of these faults: RUCAIBox/RecBole issues #2215, #2212, #2219 and #2174,
pull requests #2155 and #2203.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch

from recbole_rcekd.compat.patching import MARK, rewrite

# Old name -> the name in every version of numpy. `Config` later sets most of them itself, to the
# same types.
_NUMPY_ALIASES = {
    "float_": "float64",
    "complex_": "complex128",
    "unicode_": "str_",
    "bool8": "bool_",
    "bool": "bool_",
    "int": "int_",
    "float": "float64",
    "complex": "complex128",
    "object": "object_",
    "str": "str_",
    "long": "int_",
    "unicode": "str_",
}


def numpy_aliases() -> None:
    """Give numpy its removed type names back if they are missing.

    Breaks: numpy 2 has no `float_`, `complex_`, `unicode_`, so every `Config()` fails
    (config/configurator.py:630-635). numpy >= 1.24 has no `float`, `bool`, ...: RecBole sets them
    when a Config is *built*, but a checkpoint's Config is unpickled, so `load_data_and_model` in a
    fresh process fails at the first metric (evaluator/metrics.py:90-196, 287;
    data/interaction.py:31; data/dataset/dataset.py:652). ray 2.6.3 reads `bool8` on import.
    Upstream: see the threads at the top of this module.
    """
    for alias, target in _NUMPY_ALIASES.items():
        with warnings.catch_warnings():
            # numpy warns about some of these names when they are looked up.
            warnings.simplefilter("ignore")
            missing = not hasattr(np, alias)
        if missing:
            setattr(np, alias, getattr(np, target))


class _MissingRay(types.ModuleType):
    """A replacement for ray: it can be imported, and on first use says what is missing."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            name, "Stand-in installed by recbole_rcekd.compat, because ray cannot be imported."
        )
        # A module without a spec makes importlib.util.find_spec raise ValueError.
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        # Tools that go through sys.modules ask for dunder names and expect an AttributeError.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        raise ImportError(
            f"{self.__name__}.{name} is not available: hyper-parameter search with ray needs ray "
            f"2.6.3 on Python <= 3.11 with setuptools < 82 (here: {self._reason}). The rest of "
            "RecBole works without."
        )


def ray_stub() -> None:
    """Replace `ray` if ray, or the `pkg_resources` that it needs, is not installed.

    Breaks: `from ray import tune` at quick_start/quick_start.py:20, so RecBole's quick start cannot
    be imported without ray. RecBole limits ray to 2.6.3, which has no wheel for Python >= 3.12 and
    needs the `pkg_resources` that setuptools >= 82 no longer has. Only `tune.report` uses ray
    (quick_start.py:223, `objective_function`). Upstream: see the threads at the top of this module.
    """
    if "ray" in sys.modules:
        return
    # Only looked for: importing ray would add two seconds to every start, and only RecBole's quick
    # start needs it.
    missing = [name for name in ("ray", "pkg_resources") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"no module named {missing[0]}"
        ray, tune = _MissingRay("ray", reason), _MissingRay("ray.tune", reason)
        ray.tune = tune  # type: ignore[attr-defined]
        sys.modules.update({"ray": ray, "ray.tune": tune})


def torch_load() -> None:
    """Let RecBole's own `torch.load` calls unpickle a whole checkpoint.

    The default of other callers stays the same.

    Breaks: torch >= 2.6 loads with `weights_only=True`, and a RecBole checkpoint has a pickled
    Config (trainer/trainer.py:323, 583; quick_start/quick_start.py:250; neumf.py:84, convncf.py:82,
    nais.py:127, ract.py:75, s3rec.py:120, kd_dagfm.py:56). As in plain RecBole: open only
    checkpoints that you trust. Upstream: see the threads at the top of this module.
    """
    original: Callable[..., Any] = torch.load
    if hasattr(original, MARK) or "weights_only" not in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == "recbole" or caller.startswith("recbole."):
            kwargs.setdefault("weights_only", False)
        return original(*args, **kwargs)

    setattr(load, MARK, True)
    torch.load = load


def scipy_dok_update() -> None:
    """Give `dok_matrix` its update without checks back.

    Breaks: scipy >= 1.13 has no `dok_matrix._update`, with which the graph models fill their
    adjacency matrix (lightgcn.py:111, ngcf.py:110, ncl.py:131, gcmc.py:174, spectralcf.py:123,
    kgin.py:356, mcclk.py:425). Upstream: see the threads at the top of this module.
    """
    if hasattr(scipy.sparse.dok_matrix, "_update"):
        return

    def _update(self: Any, data: Mapping[tuple[int, int], Any]) -> None:
        # The public interface checks each entry, which takes minutes on a large graph.
        self._dict.update(data)

    scipy.sparse.dok_matrix._update = _update


def pandas_fill_nan() -> None:
    """Fill missing values by assignment instead of in place.

    Breaks, *silently*: under pandas 3 (copy-on-write) `frame[column].fillna(..., inplace=True)`
    fills a copy. Float features keep NaN, and tokens of users or items without a row of their own
    become id -9223372036854775808 (data/dataset/dataset.py:648, 650). At :501 an empty sequence
    stays NaN. Upstream: see the threads at the top of this module.
    """
    from recbole.data.dataset import Dataset

    mean = "value=feat[field].mean()"
    rewrite(
        Dataset,
        "_fill_nan",
        {
            "feat[field].fillna(value=0, inplace=True)": (
                "feat[field] = feat[field].fillna(value=0)"
            ),
            f"feat[field].fillna({mean}, inplace=True)": (
                f"feat[field] = feat[field].fillna({mean})"
            ),
        },
    )
    rewrite(
        Dataset,
        "_load_feat",
        {'df[field].fillna(value="", inplace=True)': 'df[field] = df[field].fillna(value="")'},
    )


def pandas_agg_len() -> None:
    """Take the length of each sequence with `map` instead of `agg`.

    Breaks: under pandas 3 `Series.agg(len)` is the length of the column, one number
    (data/dataset/dataset.py:712, 792, 809, 1217; data/dataset/kg_dataset.py:316). At
    data/dataset/sequential_dataset.py:163-165 the fault is *silent*: every row gets the same
    sequence length. Upstream: see the threads at the top of this module.
    """
    from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset

    for owner, method in (
        (Dataset, "_normalize"),
        (Dataset, "_discretization"),
        (Dataset, "_remap"),
        (KnowledgeBasedDataset, "_reset_ent_remapID"),
        (SequentialDataset, "_benchmark_presets"),
    ):
        rewrite(owner, method, {".agg(len)": ".map(len)"})


def stable_sort() -> None:
    """Keep interactions with equal time stamps in file order when duplicates are removed.

    Breaks, *silently*: data/dataset/dataset.py:853 sorts by time with numpy's default, which is not
    stable. With equal time stamps, `rm_dup_inter` then keeps other rows with another numpy or CPU,
    so item ids and split differ. Upstream: see the threads at the top of this module.
    """
    from recbole.data.dataset import Dataset

    sort = "ascending=True, inplace=True"
    rewrite(Dataset, "_remove_duplication", {sort: f'{sort}, kind="stable"'})


def hyperopt_generator() -> None:
    """Draw trials with numpy's new generators, which hyperopt expects since 0.2.6.

    Breaks: `exhaustive_search` (trainer/hyper_tuning.py:116), the default of `HyperTuning`, gives
    hyperopt a `RandomState`, which has no `integers`. The order of the trials differs from that
    with hyperopt 0.2.5. Upstream: none known.
    """
    from recbole.trainer import hyper_tuning

    rewrite(
        hyper_tuning,
        "exhaustive_search",
        {"np.random.RandomState(seed)": "np.random.default_rng(seed)"},
    )
