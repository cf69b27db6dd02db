"""Repairs of RecBole 1.2.1's training in several processes.

They make it work without GPUs, evaluate each user once, and write tensorboard's files once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from recbole_rcekd.compat.habits import NoTensorboard
from recbole_rcekd.compat.patching import rewrite, wrap


def _gpu_of_each(gpu_id: str, nproc: int) -> bool:
    """Whether each of several processes has a GPU.

    If GPUs are used at all, there must be one for each process.
    """
    if not gpu_id or not torch.cuda.is_available():
        return False
    if len(gpu_id.split(",")) < int(nproc):
        raise ValueError(
            f"[gpu_id]={gpu_id!r} names too few GPUs for [nproc]={nproc}: give each process one, "
            "as in --nproc=2 --gpu_id=0,1, or none with --gpu_id=''."
        )
    return True


def distributed_without_gpu() -> None:
    """Let several processes train on CPUs, and let a process build a second Config.

    Breaks: with `nproc` set, `Config` asserts GPUs (config/configurator.py:496), fixes the backend
    to nccl (:498) and the device to cuda (:508, :511). The trainer gives GPU numbers to
    `DistributedDataParallel`, and uses a batch normalisation that only works on GPUs
    (trainer/trainer.py:60-64). A second Config in a process, for example a teacher's, calls
    `init_process_group` again (:497), which raises an error. On GPUs nothing changes.
    """
    from recbole.config import Config
    from recbole.trainer.trainer import AbstractTrainer

    rank = 'self.final_config_dict["local_rank"]'
    rewrite(
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
    rewrite(
        AbstractTrainer,
        "__init__",
        {
            "convert_sync_batchnorm(model)": (
                f"convert_sync_batchnorm(model) if {on_gpu} else model"
            ),
            'device_ids=[config["local_rank"]]': (
                f'device_ids=[config["local_rank"]] if {on_gpu} else None'
            ),
        },
    )


def distributed_evaluation() -> None:
    """Let several processes evaluate each user once, and compute every metric from all users.

    Breaks, *silently*: a `DistributedSampler` divides the evaluation data
    (data/dataloader/abstract_dataloader.py:60). It repeats some users so that all processes have
    the same number. Each process then rounds its own metrics, and `Trainer._map_reduce` averages
    them with weights that count batches, not users (trainer/trainer.py:615; RecBole issue #1872).
    For metrics that are no mean over users (coverage, Gini index, AUC) such an average is wrong
    anyway. Here the processes exchange what they collected, and all compute the metrics from it.
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

    for owner, method, around in (
        (FullSortEvalDataLoader, "__init__", undivided),
        (NegSampleEvalDataLoader, "__init__", undivided),
        (Collector, "get_data_struct", together),
        (Trainer, "_map_reduce", map_reduce),
    ):
        wrap(owner, method, around)


def _put_together(struct: Any) -> None:
    """Give every process the rows that all collected, in the order that one process would have."""
    # All else that is collected describes the training data and is the same in all processes.
    names = [
        name
        for name in ("rec.items", "rec.topk", "rec.meanrank", "rec.score", "data.label")
        if name in struct
    ]
    world = torch.distributed.get_world_size()
    everyones: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyones, {name: struct.get(name) for name in names})
    for name in dict.fromkeys(name for each in everyones for name in each):
        parts = [(rank, each[name]) for rank, each in enumerate(everyones) if name in each]
        place = torch.cat([torch.arange(len(rows)) * world + rank for rank, rows in parts])
        struct.set(name, torch.cat([rows for _, rows in parts])[place.argsort()])


def distributed_tensorboard() -> None:
    """Let only the first of several processes write tensorboard's files.

    Breaks: every trainer opens a writer (trainer/trainer.py:116), so tensorboard shows the same
        curve once per process.
    """
    from recbole.trainer import trainer

    def of_the_first(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_tensorboard(*args: Any, **kwargs: Any) -> Any:
            if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
                return NoTensorboard()
            return original(*args, **kwargs)

        return get_tensorboard

    wrap(trainer, "get_tensorboard", of_the_first)
