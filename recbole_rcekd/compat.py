"""Every quirk of RecBole 1.2.1 on current numpy, pandas, scipy, torch and ray, one function each.

RecBole 1.2.1 sets no upper bound on numpy, pandas, scipy, torch or setuptools, so a plain install takes the
newest of each and fails at import; on pandas 3 it also goes wrong *silently*. `apply` mends what is broken
where it runs. Places (file:line) are inside the installed `recbole` package.

The rules: look for the feature, never compare versions; patch the narrowest thing (RecBole's own methods
rather than `pandas.Series`); change nothing that works.

Upstream threads on RecBole and its dependencies, all about some of what follows: RUCAIBox/RecBole issues
#2215, #2212, #2219 and #2174, pull requests #2155 and #2203.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch

__all__ = ["add_model", "apply", "without_anomaly_detection", "without_tensorboard"]

# Set on what we put in place of a library's own function, so that a second `apply` leaves it alone.
_MARK = "__recbole_rcekd__"
# On what we put around one, which may have been rewritten before.
_WRAPPED = "__recbole_rcekd_wrapped__"

# Old name -> the name that every numpy has. `Config` later sets most of these itself, to these same types.
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
    """Give numpy its removed type names back, each only where it is missing.

    Breaks: numpy 2 has no `float_`, `complex_`, `unicode_`, so every `Config()` fails
    (config/configurator.py:630-635). numpy >= 1.24 has no `float`, `bool`, ...: RecBole sets them when a
    Config is *built*, but a checkpoint's Config is unpickled, so `load_data_and_model` in a fresh process
    fails at the first metric (evaluator/metrics.py:90-196, 287; data/interaction.py:31;
    data/dataset/dataset.py:652). ray 2.6.3 reads `bool8` on import.
    Upstream: see the threads at the top of this module.
    """
    for alias, target in _NUMPY_ALIASES.items():
        with warnings.catch_warnings():
            # numpy warns about some of these names when they are merely looked up.
            warnings.simplefilter("ignore")
            missing = not hasattr(np, alias)
        if missing:
            setattr(np, alias, getattr(np, target))


class _MissingRay(types.ModuleType):
    """A stand-in for ray: it can be imported, and says on first use what is missing."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, "Stand-in installed by recbole_rcekd.compat, because ray cannot be imported.")
        # A module without a spec makes importlib.util.find_spec raise ValueError.
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        # Tools that walk sys.modules ask for dunder names and expect the usual answer.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        raise ImportError(
            f"{self.__name__}.{name} is not available: hyper-parameter search with ray needs ray 2.6.3 on "
            f"Python <= 3.11 with setuptools < 82 (here: {self._reason}). The rest of RecBole works without."
        )


def ray_stub() -> None:
    """Put a stand-in for `ray` in place where ray, or the `pkg_resources` it needs, is not installed.

    Breaks: `from ray import tune` at quick_start/quick_start.py:20, so RecBole's quick start needs ray even
    to be imported. RecBole caps ray at 2.6.3, which has no wheel for Python >= 3.12 and needs the
    `pkg_resources` that setuptools >= 82 no longer ships. Only `tune.report` uses it (quick_start.py:223,
    `objective_function`).
    Upstream: see the threads at the top of this module.
    """
    if "ray" in sys.modules:
        return
    # Looked for, not imported: that alone takes two seconds of every start, and only RecBole's quick start needs it.
    missing = [name for name in ("ray", "pkg_resources") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"no module named {missing[0]}"
        ray, tune = _MissingRay("ray", reason), _MissingRay("ray.tune", reason)
        ray.tune = tune  # type: ignore[attr-defined]
        sys.modules.update({"ray": ray, "ray.tune": tune})


def torch_load() -> None:
    """Let RecBole's own `torch.load` calls unpickle a whole checkpoint; nobody else's default changes.

    Breaks: torch >= 2.6 loads with `weights_only=True`, and a RecBole checkpoint holds a pickled Config
    (trainer/trainer.py:323, 583; quick_start/quick_start.py:250; neumf.py:84, convncf.py:82, nais.py:127,
    ract.py:75, s3rec.py:120, kd_dagfm.py:56). As in plain RecBole: open only checkpoints that you trust.
    Upstream: see the threads at the top of this module.
    """
    original: Callable[..., Any] = torch.load
    if hasattr(original, _MARK) or "weights_only" not in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == "recbole" or caller.startswith("recbole."):
            kwargs.setdefault("weights_only", False)
        return original(*args, **kwargs)

    setattr(load, _MARK, True)
    torch.load = load


def scipy_dok_update() -> None:
    """Give `dok_matrix` its unchecked bulk update back.

    Breaks: scipy >= 1.13 has no `dok_matrix._update`, with which the graph models fill their adjacency matrix
    (lightgcn.py:111, ngcf.py:110, ncl.py:131, gcmc.py:174, spectralcf.py:123, kgin.py:356, mcclk.py:425).
    Upstream: see the threads at the top of this module.
    """
    if hasattr(scipy.sparse.dok_matrix, "_update"):
        return

    def _update(self: Any, data: Mapping[tuple[int, int], Any]) -> None:
        # Setting the entries through the public interface checks each one: minutes on a large graph.
        self._dict.update(data)

    scipy.sparse.dok_matrix._update = _update


def _rewrite(owner: Any, method: str, edits: Mapping[str, str], names: Mapping[str, Any] | None = None) -> None:
    """Recompile one method of RecBole with some of its text replaced, at its own line numbers.

    Narrower than a method of our own: every other line stays RecBole's, and so do tracebacks.

    Args:
        owner: The class that defines the method itself, or the module that defines a function.
        method: The method's name. It must not use `super()` without arguments.
        edits: Old text -> new text of as many lines.
        names: What the new text refers to, if it is nothing that the method's module knows.

    Raises:
        RuntimeError: If an old text is not there. Going on would bring a silent fault back.
    """
    function = vars(owner)[method]
    if hasattr(function, _MARK):
        return
    lines, first_line = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    for old, new in edits.items():
        if old not in source:
            raise RuntimeError(
                f"{function.__module__}.{function.__qualname__} has no line {old!r}: this is not the RecBole "
                f"that recbole_rcekd was written for. Install recbole==1.2.1."
            )
        source = source.replace(old, new)
    function.__globals__.update(names or {})
    # dont_inherit: this file's __future__ imports are not RecBole's.
    code = compile("\n" * (first_line - 1) + source, function.__code__.co_filename, "exec", dont_inherit=True)
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    replacement = namespace[method]
    replacement.__qualname__ = function.__qualname__
    replacement.__module__ = function.__module__
    setattr(replacement, _MARK, True)
    setattr(owner, method, replacement)


def pandas_fill_nan() -> None:
    """Fill missing values by assignment instead of in place.

    Breaks, *silently*: under pandas 3 (copy-on-write) `frame[column].fillna(..., inplace=True)` fills a copy.
    Float features keep NaN, and tokens of users or items without a row of their own become id
    -9223372036854775808 (data/dataset/dataset.py:648, 650). At :501 an empty sequence stays NaN.
    Upstream: see the threads at the top of this module.
    """
    from recbole.data.dataset import Dataset

    mean = "value=feat[field].mean()"
    _rewrite(
        Dataset,
        "_fill_nan",
        {
            "feat[field].fillna(value=0, inplace=True)": "feat[field] = feat[field].fillna(value=0)",
            f"feat[field].fillna({mean}, inplace=True)": f"feat[field] = feat[field].fillna({mean})",
        },
    )
    _rewrite(
        Dataset,
        "_load_feat",
        {'df[field].fillna(value="", inplace=True)': 'df[field] = df[field].fillna(value="")'},
    )


def pandas_agg_len() -> None:
    """Take the length of each sequence with `map` instead of `agg`.

    Breaks: under pandas 3 `Series.agg(len)` is the length of the column, one number
    (data/dataset/dataset.py:712, 792, 809, 1217; data/dataset/kg_dataset.py:316). At
    data/dataset/sequential_dataset.py:163-165 the fault is *silent*: every row gets the same sequence length.
    Upstream: see the threads at the top of this module.
    """
    from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset

    for owner, method in (
        (Dataset, "_normalize"),
        (Dataset, "_discretization"),
        (Dataset, "_remap"),
        (KnowledgeBasedDataset, "_reset_ent_remapID"),
        (SequentialDataset, "_benchmark_presets"),
    ):
        _rewrite(owner, method, {".agg(len)": ".map(len)"})


def stable_sort() -> None:
    """Keep interactions with equal time stamps in file order when duplicates are removed.

    Breaks, *silently*: data/dataset/dataset.py:853 sorts by time with numpy's unstable default. With ties,
    `rm_dup_inter` then keeps other rows, gives other item ids and another split on another numpy or CPU.
    Upstream: see the threads at the top of this module.
    """
    from recbole.data.dataset import Dataset

    sort = "ascending=True, inplace=True"
    _rewrite(Dataset, "_remove_duplication", {sort: f'{sort}, kind="stable"'})


def _gpu_of_each(gpu_id: str, nproc: int) -> bool:
    """Whether each of several processes has a GPU; if there are GPUs at all, there must be enough of them."""
    if not gpu_id or not torch.cuda.is_available():
        return False
    if len(gpu_id.split(",")) < int(nproc):
        raise ValueError(
            f"[gpu_id]={gpu_id!r} names too few GPUs for [nproc]={nproc}: give each process one, as in "
            "--nproc=2 --gpu_id=0,1, or none with --gpu_id=''."
        )
    return True


def distributed_without_gpu() -> None:
    """Let several processes train on CPUs, and let a process build a second Config.

    Breaks: with `nproc` set, `Config` asserts GPUs (config/configurator.py:496), fixes the backend to nccl (:498) and the
    device to cuda (:508, :511); the trainer hands GPU numbers to `DistributedDataParallel`, and batch
    normalisation to a kind that only GPUs have (trainer/trainer.py:60-64). A second Config in a process, a teacher's for
    example, calls `init_process_group` again (:497), which raises. On GPUs all stays as it is.
    """
    from recbole.config import Config
    from recbole.trainer.trainer import AbstractTrainer

    rank = 'self.final_config_dict["local_rank"]'
    _rewrite(
        Config,
        "_init_device",
        {
            'assert len(gpu_id.split(",")) >= self.final_config_dict["nproc"]': (
                'on_gpu = _gpu_of_each(gpu_id, self.final_config_dict["nproc"])'
            ),
            "torch.distributed.init_process_group(": (
                "torch.distributed.is_initialized() or torch.distributed.init_process_group("
            ),
            'backend="nccl"': 'backend="nccl" if on_gpu else "gloo"',
            f'"cuda", {rank}': f'*(("cuda", {rank}) if on_gpu else ("cpu",))',
            f"torch.cuda.set_device({rank})": f"on_gpu and torch.cuda.set_device({rank})",
        },
        {"_gpu_of_each": _gpu_of_each},
    )
    on_gpu = 'config["device"].type == "cuda"'
    _rewrite(
        AbstractTrainer,
        "__init__",
        {
            "convert_sync_batchnorm(model)": f"convert_sync_batchnorm(model) if {on_gpu} else model",
            'device_ids=[config["local_rank"]]': f'device_ids=[config["local_rank"]] if {on_gpu} else None',
        },
    )


def _on_cpu(value: Any) -> Any:
    """A tensor on the CPU; anything else as it is."""
    return value.cpu() if isinstance(value, torch.Tensor) else value


def evaluation_counts() -> None:
    """Let the metrics of what lists are made of (`ItemCoverage`, `AveragePopularity`, `GiniIndex`, …) be evaluated.

    Breaks: `.cpu()` of the number of items, and of the counters of interactions, which are no tensors
    (evaluator/collector.py:227).
    Upstream: none known.
    """
    from recbole.evaluator import Collector

    kept = "self.data_struct._data_dict[key]"
    _rewrite(Collector, "get_data_struct", {f"{kept}.cpu()": f"_on_cpu({kept})"}, {"_on_cpu": _on_cpu})


def distributed_evaluation() -> None:
    """Let several processes evaluate each user once, and compute every metric from all users.

    Breaks, *silently*: evaluation data are dealt out by a `DistributedSampler`
    (data/dataloader/abstract_dataloader.py:60), which repeats some users so that all processes have as many. Each
    process then rounds its own metrics, and `Trainer._map_reduce` averages them with weights that count batches, not
    users (trainer/trainer.py:615; RecBole issue #1872); of metrics that are no mean over users (coverage, Gini index, AUC)
    that is no average at all. Here the processes put together what they collected, and all compute the same.
    """
    from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
    from recbole.evaluator import Collector
    from recbole.trainer import Trainer

    def undivided(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, config, *args, **kwargs)
            if not config["single_spec"]:
                dealt = self.sampler
                self.batch_sampler.sampler = range(dealt.rank, self.sample_size, dealt.num_replicas)

        return __init__

    def together(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_data_struct(self: Any) -> Any:
            struct = original(self)
            if not self.config["single_spec"]:
                _put_together(struct)
            return struct

        return get_data_struct

    def map_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _map_reduce(self: Any, result: Any, num_sample: int) -> Any:
            return result

        return _map_reduce

    for owner, method, wrap in (
        (FullSortEvalDataLoader, "__init__", undivided),
        (NegSampleEvalDataLoader, "__init__", undivided),
        (Collector, "get_data_struct", together),
        (Trainer, "_map_reduce", map_reduce),
    ):
        _wrap(owner, method, wrap)


def _put_together(struct: Any) -> None:
    """Give every process the rows that all collected, in the order in which one process would have them."""
    # The rest of what is collected describes the training data and is the same everywhere.
    names = [name for name in ("rec.items", "rec.topk", "rec.meanrank", "rec.score", "data.label") if name in struct]
    world = torch.distributed.get_world_size()
    everyones: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyones, {name: struct.get(name) for name in names})
    for name in dict.fromkeys(name for each in everyones for name in each):
        parts = [(rank, each[name]) for rank, each in enumerate(everyones) if name in each]
        place = torch.cat([torch.arange(len(rows)) * world + rank for rank, rows in parts])
        struct.set(name, torch.cat([rows for _, rows in parts])[place.argsort()])


class _NoTensorboard:
    """What a writer is asked for, and nothing done."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def distributed_tensorboard() -> None:
    """Let the first of several processes write tensorboard's files, and no other.

    Breaks: every trainer opens a writer (trainer/trainer.py:116), so the same course is drawn once per process.
    """
    from recbole.trainer import trainer

    def of_the_first(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_tensorboard(*args: Any, **kwargs: Any) -> Any:
            if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
                return _NoTensorboard()
            return original(*args, **kwargs)

        return get_tensorboard

    _wrap(trainer, "get_tensorboard", of_the_first)


@contextlib.contextmanager
def without_tensorboard() -> Iterator[None]:
    """While this lasts, trainers open no tensorboard: those that only evaluate leave no folder behind.

    Breaks: every trainer opens a writer in the working directory (trainer/trainer.py:116), which cannot be turned off.
    """
    from recbole.trainer import trainer

    original = trainer.get_tensorboard
    trainer.get_tensorboard = lambda *args, **kwargs: _NoTensorboard()
    try:
        yield
    finally:
        trainer.get_tensorboard = original


def without_anomaly_detection() -> Any:
    """A context without torch's anomaly detection, which looks for NaN after every step of every gradient.

    Breaks: `torch.autograd.set_detect_anomaly(True)` stands in the module of SINE (sequential_recommender/sine.py:25),
    which is imported with any sequential model, so that the training of all of them, and of whatever comes later, takes
    a fifth longer. Numbers stay as they are.
    Upstream: none known.
    """
    return torch.autograd.set_detect_anomaly(False)


def _wrap(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around one of RecBole's, once."""
    original = vars(owner)[name]
    if hasattr(original, _WRAPPED):
        return
    replacement = wrap(original)
    setattr(replacement, _WRAPPED, True)
    setattr(owner, name, replacement)


def hyperopt_generator() -> None:
    """Draw trials with numpy's new generators, which hyperopt expects since 0.2.6.

    Breaks: `exhaustive_search` (trainer/hyper_tuning.py:116), the default of `HyperTuning`, hands hyperopt a
    `RandomState`, which has no `integers`. The order of the trials is another one than with hyperopt 0.2.5.
    Upstream: none known.
    """
    from recbole.trainer import hyper_tuning

    _rewrite(hyper_tuning, "exhaustive_search", {"np.random.RandomState(seed)": "np.random.default_rng(seed)"})


# Model -> its default settings; read by the patch in `add_model`.
_MODEL_DEFAULTS: dict[str, str] = {}


def add_model(name: str, module: types.ModuleType, kind: str, defaults: str, dataset: type | None = None) -> None:
    """Let RecBole find a model that lies outside of it; calling it again changes nothing.

    Breaks: RecBole finds a model's class (utils/utils.py `get_model`), its dataset (data/utils.py `create_dataset`) and
    its default settings (config/configurator.py `_load_internal_config_dict`) by name in its own folders only, so
    `run_recbole` and `load_data_and_model` cannot take a model from outside (issues #489, #1544, #1928).

    Args:
        name: The model's name, which is the name of its class in `module`.
        module: Put under `recbole.model.<kind>.<name in lower case>`, where `get_model` looks first in `sys.modules`.
        kind: `general_recommender`, `sequential_recommender`, ...
        defaults: A yaml file, read where RecBole reads its own: after overall.yaml, before that of the dataset.
        dataset: What RecBole finds as `<name>Dataset`; otherwise it chooses by the model's type.
    """
    from recbole.config import Config
    from recbole.data import dataset as datasets

    sys.modules[f"recbole.model.{kind}.{name.lower()}"] = module
    if dataset is not None:
        setattr(datasets, f"{name}Dataset", dataset)
    _MODEL_DEFAULTS[name] = defaults

    def with_ours(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _update_internal_config_dict(self: Any, file: str) -> Any:
            loaded = original(self, file)
            if os.path.basename(file) == "overall.yaml" and self.model in _MODEL_DEFAULTS:
                original(self, _MODEL_DEFAULTS[self.model])
            return loaded

        return _update_internal_config_dict

    _wrap(Config, "_update_internal_config_dict", with_ours)


# In this order: importing ray needs numpy's old names, and from `pandas_fill_nan` on they import RecBole.
_QUIRKS: tuple[Callable[[], None], ...] = (
    numpy_aliases,
    ray_stub,
    torch_load,
    scipy_dok_update,
    pandas_fill_nan,
    pandas_agg_len,
    stable_sort,
    distributed_without_gpu,
    evaluation_counts,
    distributed_evaluation,
    distributed_tensorboard,
    hyperopt_generator,
)


def apply() -> None:
    """Make RecBole 1.2.1 work on the libraries that are installed; calling it again changes nothing.

    Call it before anything imports `recbole.quick_start`.
    """
    for mend in _QUIRKS:
        mend()
