"""Faults and limits of RecBole 1.2.1 with any version of its libraries.

They concern some metrics, tensorboard, anomaly detection, models from outside RecBole, and the size
of evaluation batches.
"""

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
    """Let metrics such as `ItemCoverage`, `AveragePopularity` and `GiniIndex` be evaluated.

    Breaks: RecBole calls `.cpu()` on the number of items and on the counters of interactions, which
    are no tensors (evaluator/collector.py:227). Upstream: none known.
    """
    from recbole.evaluator import Collector

    kept = "self.data_struct._data_dict[key]"
    rewrite(
        Collector, "get_data_struct", {f"{kept}.cpu()": f"_on_cpu({kept})"}, {"_on_cpu": _on_cpu}
    )


class NoTensorboard:
    """A tensorboard writer that writes nothing."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


@contextlib.contextmanager
def without_tensorboard() -> Iterator[None]:
    """Within the block, trainers open no tensorboard, so an evaluation leaves no folder behind.

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
    """A context manager without torch's anomaly detection, which checks all gradients for NaN.

    Breaks: the module of SINE calls `torch.autograd.set_detect_anomaly(True)`
    (sequential_recommender/sine.py:25). It is imported with any sequential model, so all training
    in the process takes a fifth longer from then on. The results stay the same. Upstream: none
    known.
    """
    return torch.autograd.set_detect_anomaly(False)


# Model -> its default settings; read by the patch in `add_model`.
_MODEL_DEFAULTS: dict[str, str] = {}


def add_model(
    name: str, module: types.ModuleType, kind: str, defaults: str, dataset: type | None = None
) -> None:
    """Let RecBole find a model that is not one of its own; calling it again changes nothing.

    Breaks: RecBole looks for a model's class (utils/utils.py `get_model`), its dataset
    (data/utils.py `create_dataset`) and its default settings (config/configurator.py
    `_load_internal_config_dict`) by name in its own folders only. So `run_recbole` and
    `load_data_and_model` cannot use a model from outside (issues #489, #1544, #1928).

    Args:
        name: The model's name, which is the name of its class in `module`.
        module: The model's module, entered in `sys.modules` as
            `recbole.model.<kind>.<name in lower case>`, where `get_model` looks first.
        kind: `general_recommender`, `sequential_recommender`, ...
        defaults: A yaml file with default settings. It is read like RecBole's own: after
            overall.yaml, before the yaml file of the dataset.
        dataset: The class that RecBole uses as `<name>Dataset`; without it RecBole chooses by the
            model's type.
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


# The embeddings that LightGCN, NGCF, DGCF, SGL, NCL, SpectralCF and DMF keep in evaluation. If a
# scoring call left them in the model, the next validation would rank with embeddings from before
# the training step.
EVALUATION_CACHES = ("restore_user_e", "restore_item_e", "i_embedding")
# Keys of a checkpoint's Config that would read or write other files, and values that do not: the
# weights come from the checkpoint alone.
OTHER_FILES: dict[str, Any] = {
    "dataset_save_path": None,
    "dataloaders_save_path": None,
    "save_dataset": False,
    "save_dataloaders": False,
    "use_pretrain": False,  # NeuMF
}
# Keys of some models that would read other files, while the model is built.
OTHER_FILES_OF: dict[str, dict[str, Any]] = {
    "ConvNCF": {"train_method": "no_pretrain"},
    "KD_DAGFM": {"phase": "teacher_training"},
    "NAIS": {"pretrain_path": None},
    "RaCT": {"train_stage": "actor_pretrain"},
    "S3Rec": {"train_stage": "pretrain"},
}
# With RecBole's default of 4096 scores, full-sort evaluation takes a few users at a time. This many
# fit in the memory of any machine.
EVAL_BATCH_SIZE = 2**20


def evaluate_more(config: Any) -> None:
    """Evaluate more users at a time than by RecBole's default, where memory allows it.

    That is full-sort evaluation of models that score users, where the batch size counts scores.
    (Sequential and context-aware models have larger inputs, and for sampled items RecBole makes
    full rows for a whole batch.)
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
