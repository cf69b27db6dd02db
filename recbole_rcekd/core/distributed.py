"""Several processes that train one model: how they communicate, and how they are started.

RecBole's distributed training puts ``DistributedDataParallel`` around the model: each process (a
*rank*) computes the loss of its part of every batch, and the gradients are averaged. Here the users
are divided among the ranks too: user u belongs to rank u mod W, which keeps the candidates of its
own users and computes their KD loss.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from logging import ERROR, basicConfig, getLogger
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from recbole_rcekd.core.errors import KDError, ProcessError, SettingsError

T = TypeVar("T")
# The keys of RecBole's Config that say which process this is and how it reaches the others. None of
# them changes the results.
PLACE_KEYS = frozenset({"nproc", "ip", "port", "offset", "group_offset"})
# These also say on which machine and device to compute, and where files are. They change the
# results by rounding at most.
MACHINE_KEYS = PLACE_KEYS | {"device", "gpu_id", "use_gpu", "worker", "checkpoint_dir", "data_path"}
# RecBole's default port; used if another machine has to know it.
_PORT = 5678
# The seeds of two ranks differ by more than the seeds that people usually try (2020, 2021, …).
_SEED_STEP = 1_000_003

# Set in a started process: the folder where the process that started it reads its messages.
_told: Path | None = None


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the communication with the other ranks of one training.

    By default this is the only process, and no method communicates. With several processes, all
    ranks must call the methods that communicate, in the same order.

    Args:
        rank: 0 to ``world − 1``; rank 0 writes the files and the log.
        world: the number of ranks.
        device: the device of tensors that are sent (NCCL sends from GPUs only).
    """

    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, config: Any) -> Ranks:
        """The rank of this process, by its RecBole Config; without ``local_rank`` it is alone."""
        if config["single_spec"] or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(config["device"]))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def seed(self, base: int) -> int:
        """A seed of this rank's own; rank 0 has ``base`` itself."""
        return base + _SEED_STEP * self.rank

    # -- which ids belong to which rank ------------------------------------------------------------

    def own(self, ids: Tensor) -> Tensor:
        """Those of ``ids`` that belong to this rank, in their order."""
        return ids if self.world == 1 else ids[ids % self.world == self.rank]

    def row(self, ids: Tensor) -> Tensor:
        """The row of each id in a table with one row per id of this rank, in ascending order."""
        return ids if self.world == 1 else ids // self.world

    def counts(self, ids: Tensor) -> list[int]:
        """How many of ``ids`` each rank owns."""
        if self.world == 1:
            return [len(ids)]
        return [int(n) for n in torch.bincount(ids % self.world, minlength=self.world)]

    # -- communication -----------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]

    def all(self, value: bool) -> bool:
        """Whether the value is true on every rank."""
        return all(self.gather(value))

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """The mean of each number over the ranks that have it, on all ranks."""
        if self.world == 1:
            return numbers
        every = self.gather(numbers)
        names = dict.fromkeys(name for each in every for name in each)
        return {
            name: statistics.fmean(each[name] for each in every if name in each) for name in names
        }

    def joined(self, part: Tensor) -> Tensor:
        """The equally long parts ``[n]`` of all ranks, concatenated ``[W·n]``, on all ranks."""
        if self.world == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def whole(self, share: Tensor, n: int) -> Tensor | None:
        """The table ``[n, …]`` made of all ranks' rows (see :meth:`row`).

        Only rank 0 gets it; the other ranks get ``None``.
        """
        if self.world == 1:
            return share
        longest = -(-n // self.world)
        padded = torch.zeros((longest, *share.shape[1:]), dtype=share.dtype, device=self.device)
        padded[: len(share)] = share.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.first else None
        dist.gather(padded, parts)
        return None if parts is None else torch.stack(parts, 1).flatten(0, 1)[:n].to(share.device)


# -- starting the processes ------------------------------------------------------------------------


def run_ranks(
    work: Callable[..., T],
    arguments: dict[str, Any],
    nproc: int,
    world_size: int = -1,
    ip: str = "localhost",
    port: int | None = None,
    offset: int = 0,
) -> T:
    """Call ``work`` in ``nproc`` new processes, as RecBole's ``run`` does.

    Each process finds its rank in ``config_dict``.

    Args:
        work: a function of a module, usually ``run_recbole_kd``; each process imports it.
        arguments: the keyword arguments of ``work``.
        nproc: the number of processes on this machine.
        world_size: the number of processes on all machines; −1: there is no other machine.
        ip: the machine of rank 0.
        port: a free port on that machine; default: RecBole's 5678, or any free one if there is no
            other machine.
        offset: the rank of this machine's first process.

    Returns:
        What ``work`` returned in this machine's first process.

    Raises:
        KDError: a process raised it.
        ProcessError: a process died or failed; the others were stopped.
    """
    world_size = nproc + offset if world_size <= 0 else world_size
    if nproc < 1 or offset < 0 or offset + nproc > world_size:
        raise SettingsError(
            f"[nproc]={nproc} processes from [group_offset]={offset} on are not among "
            f"[world_size]={world_size}."
        )
    if port is None:
        port = _free_port() if nproc == world_size else _PORT
    place = {
        "nproc": nproc,
        "world_size": world_size,
        "ip": ip,
        "port": str(port),
        "offset": offset,
    }
    with tempfile.TemporaryDirectory(prefix="recbole_rcekd-") as folder:
        context: Any = spawn(  # type: ignore[no-untyped-call]
            _in_rank, (work, arguments, place, folder), nprocs=nproc, join=False
        )
        # It would log each process that it stops; the error below names the one that failed first.
        getLogger("torch.multiprocessing.spawn").setLevel(ERROR)
        try:
            while not context.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise _cause(context, error, place, Path(folder)) from None
        finally:
            for process in context.processes:  # after Ctrl-C some may still run
                if process.is_alive():
                    process.terminate()
                    process.join()
        if not (Path(folder) / "result").exists():
            # Only an interrupt ends a process without a result and without an error.
            raise KeyboardInterrupt
        result: T = pickle.loads((Path(folder) / "result").read_bytes())
        return result


def note_checkpoint(file: str) -> None:
    """Tell the process that started this one, if any, which checkpoint was written last."""
    if _told is not None:
        (_told / "checkpoint").write_text(file, encoding="utf-8")


def _in_rank(
    local_rank: int,
    work: Callable[..., Any],
    arguments: dict[str, Any],
    place: dict[str, Any],
    folder: str,
) -> None:
    global _told
    _told = Path(folder)
    # torch interrupts a process when the process that started it dies. A command in the background
    # may ignore interrupts; its processes inherit that, and would go on alone.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if local_rank:
        basicConfig(level=ERROR)  # as in RecBole, only the first process logs
    if "OMP_NUM_THREADS" not in os.environ:
        # By default each process would use all cores, and they would wait for each other.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place["nproc"]))
    given = {**(arguments.get("config_dict") or {}), **place, "local_rank": local_rank}
    try:
        result = work(**{**arguments, "config_dict": given})
    except KDError as error:
        (_told / f"error-{local_rank}").write_bytes(pickle.dumps(error))
        sys.exit(2)
    if local_rank == 0:
        (_told / "result").write_bytes(pickle.dumps(result))


def _cause(context: Any, error: Exception, place: dict[str, Any], folder: Path) -> KDError:
    """The error of the process that failed first; the others fail because of it, or are stopped."""
    on_purpose = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
    if on_purpose:
        raised: KDError = pickle.loads(on_purpose[0].read_bytes())
        return raised
    codes = [process.exitcode or 0 for process in context.processes]
    traces = [
        rank for rank, file in enumerate(context.error_files) if file and os.path.exists(file)
    ]
    died = [
        rank
        for rank, code in enumerate(codes)
        if code not in (0, -signal.SIGTERM) and rank not in traces
    ]
    if traces and not died:
        local_rank = min(traces, key=lambda rank: os.stat(context.error_files[rank]).st_mtime_ns)
        trace = pickle.loads(Path(context.error_files[local_rank]).read_bytes()).strip()
        getLogger().error(trace)
        what = f"failed with {trace.splitlines()[-1].rstrip('.')}"
    else:
        local_rank = died[0] if died else int(getattr(error, "error_index", 0))
        code = codes[local_rank]
        what = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with status {code}"
        what += (
            " (the system does that when memory runs out)"
            if _signal_name(-code) == "SIGKILL"
            else ""
        )
    checkpoint = folder / "checkpoint"
    last = (
        f"the last checkpoint, [{checkpoint.read_text(encoding='utf-8')}], is whole"
        if checkpoint.exists()
        else ""
    )
    return ProcessError(
        f"Process {place['offset'] + local_rank} of {place['world_size']} {what}, so the others "
        f"were stopped; {last or 'there is no checkpoint yet'}. With [output_dir], the same "
        "command goes on with what is not finished."
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
