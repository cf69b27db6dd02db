"""What RecBole 1.2.1 does on every stack and should not, or cannot do: some metrics, no tensorboard, models of others."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from recbole_rcekd.compat.patching import rewrite, wrap


def _on_cpu(value: Any) -> Any:
    """A tensor on the CPU; anything else as it is."""
    return value.cpu() if isinstance(value, torch.Tensor) else value


def evaluation_counts() -> None:
    """Let the metrics of what lists are made of (`ItemCoverage`, `AveragePopularity`, `GiniIndex`, …) be evaluated.

    Breaks: `.cpu()` of the number of items, and of the counters of interactions, which are no
    tensors (evaluator/collector.py:227). Upstream: none known.
    """
    from recbole.evaluator import Collector

    kept = "self.data_struct._data_dict[key]"
    rewrite(
        Collector, "get_data_struct", {f"{kept}.cpu()": f"_on_cpu({kept})"}, {"_on_cpu": _on_cpu}
    )


class NoTensorboard:
    """A writer that writes nothing."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """As a writer's."""

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        """As a writer's."""


@contextlib.contextmanager
def without_tensorboard() -> Iterator[None]:
    """While this lasts, trainers open no tensorboard: those that only evaluate leave no folder behind.

    Breaks: every trainer opens a writer in the working directory (trainer/trainer.py:116), which
        cannot be turned off.
    """
    from recbole.trainer import trainer

    original = trainer.get_tensorboard
    trainer.get_tensorboard = lambda *args, **kwargs: NoTensorboard()
    try:
        yield
    finally:
        trainer.get_tensorboard = original


def without_anomaly_detection() -> Any:
    """A context without torch's anomaly detection, which looks for NaN after every step of every gradient.

    Breaks: `torch.autograd.set_detect_anomaly(True)` stands in the module of SINE
    (sequential_recommender/sine.py:25), which is imported with any sequential model, so that the
    training of all of them, and of whatever comes later, takes a fifth longer. Numbers stay as they
    are. Upstream: none known.
    """
    return torch.autograd.set_detect_anomaly(False)


# Model -> its default settings; read by the patch in `add_model`.
_MODEL_DEFAULTS: dict[str, str] = {}


def add_model(
    name: str, module: types.ModuleType, kind: str, defaults: str, dataset: type | None = None
) -> None:
    """Let RecBole find a model that lies outside of it; calling it again changes nothing.

    Breaks: RecBole finds a model's class (utils/utils.py `get_model`), its dataset (data/utils.py
    `create_dataset`) and its default settings (config/configurator.py `_load_internal_config_dict`)
    by name in its own folders only, so `run_recbole` and `load_data_and_model` cannot take a model
    from outside (issues #489, #1544, #1928).

    Args:
        name: The model's name, which is the name of its class in `module`.
        module: Put under `recbole.model.<kind>.<name in lower case>`, where `get_model` looks first
            in `sys.modules`.
        kind: `general_recommender`, `sequential_recommender`, ...
        defaults: A yaml file, read where RecBole reads its own: after overall.yaml, before that of
            the dataset.
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

    wrap(Config, "_update_internal_config_dict", with_ours)


# RecBole's default of 4096 scores a handful of users at a time in full-sort evaluation; this many
# fit any machine.
EVAL_BATCH_SIZE = 2**20


def evaluate_more(config: Any) -> None:
    """Let more be evaluated at a time than RecBole's default, where that is safe.

    RecBole counts scores for models that score users. (Rows, and pairs of rows with features, are
    larger; and for sampled items it makes full rows of whole batches.)
    """
    from recbole.utils import ModelType

    small = (ModelType.GENERAL, ModelType.KNOWLEDGE, ModelType.TRADITIONAL)
    full = all(config["eval_args"]["mode"][phase] == "full" for phase in ("valid", "test"))
    if (
        full
        and config["MODEL_TYPE"] in small
        and "eval_batch_size" not in config.external_config_dict
    ):
        config["eval_batch_size"] = EVAL_BATCH_SIZE
