"""A teacher's scores, computed once and kept on disk.

* :class:`FactorScores` for BPR, LightGCN and all other models whose scores are dot products: two
  tables. They are exact and small ((users + items) × d), and give the score of any pair.
* :class:`DenseScores` for all other models (NeuMF, auto-encoders, item-based models): a matrix of
  users × items on disk. It is memory-mapped, so that only the parts that are read take memory.

:func:`open_teacher_scores` finds the scores on disk, in a folder named by the teacher's
fingerprint, or computes them. The teacher's model is only built if they are not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import KDError, TeacherError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.store import Store
from recbole_rcekd.core.top_k import CELLS_AT_A_TIME
from recbole_rcekd.core.types import Seen
from recbole_rcekd.teachers.score_tables import DenseScores, FactorScores, blocks, write_if_possible


class Scored(Protocol):
    """What a teacher must have, so that its scores can be computed and kept on disk."""

    source: str
    device: torch.device
    n_items: int
    for_rows: bool
    scores_rows: bool

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the scores depend on."""
        ...

    @property
    def n_contexts(self) -> int:
        """How many users (or rows of sequences) there are, padding included."""
        ...

    @property
    def seen(self) -> Seen:
        """The items that top-K lists of unseen items leave out, for each user."""
        ...

    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores of all items, ``[n, n_items]``."""
        ...

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Two tables whose product is the scores, if any."""
        ...

    def user_tokens(self, contexts: Tensor) -> list[str]:
        """The tokens of users, for messages."""
        ...

    def release(self) -> None:
        """Free the memory that is only needed to compute scores."""
        ...


def open_teacher_scores(
    teacher: Scored, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
) -> FactorScores | DenseScores:
    """The teacher's scores, from disk if they are there; otherwise they are computed and kept.

    Args:
        teacher: the teacher; its scores are computed only if they are not on disk.
        settings: ``kd_cache_dir`` and ``kd_cache_dtype`` are used.
        show_progress: show a progress bar while scores are computed.
        ranks: this process among those that need the scores; they share the work.

    Raises:
        TeacherError: the teacher gives NaN or infinite scores; the message names users.
        KDError: dense scores do not fit on the disk.
    """
    try:
        return _open_or_make(teacher, settings, show_progress, ranks or Ranks())
    finally:
        teacher.release()


def _open_or_make(
    teacher: Scored, settings: KDSettings, show_progress: bool, ranks: Ranks
) -> FactorScores | DenseScores:
    store = Store(Path(settings.kd_cache_dir) / teacher.fingerprint)
    # Each user belongs to one rank, which makes the user's top-K lists. The rows of a sequential
    # student come to any rank.
    owners = Ranks() if teacher.for_rows else ranks
    dense_name = f"dense-{settings.kd_cache_dtype}"
    found = store.read("factors")
    # The ranks decide together: if one does not find the scores, all compute them.
    if ranks.all(found is not None) and found is not None:
        getLogger().info(f"Teacher scores: two tables, from [{store.root}]")
        users, items = (
            torch.from_numpy(found[key]).to(teacher.device) for key in ("users", "items")
        )
        return FactorScores(users, items, teacher.seen, store, ranks=owners)
    found = store.read(dense_name, mmap=True)
    if ranks.all(found is not None) and found is not None:
        getLogger().info(
            f"Teacher scores: a matrix of {settings.kd_cache_dtype}, from [{store.root}]"
        )
        return DenseScores(found["scores"], teacher.seen, store, teacher.device, ranks=owners)

    factors = teacher.factors()
    if factors is not None:
        _require_finite_factors(teacher, *factors)
        if ranks.first:
            tables = (factor.cpu().numpy() for factor in factors)
            write_if_possible(store, "factors", dict(zip(("users", "items"), tables, strict=True)))
        getLogger().info(f"Teacher scores: two tables, computed, kept in [{store.root}]")
        return FactorScores(*factors, teacher.seen, store, ranks=owners)
    _write_dense(teacher, store, dense_name, settings.kd_cache_dtype, show_progress, ranks)
    written = store.read(dense_name, mmap=True)
    if written is None:
        raise KDError(f"The teacher's scores in [{store.root}] vanished while they were written.")
    getLogger().info(
        f"Teacher scores: a matrix of {settings.kd_cache_dtype}, computed, kept in [{store.root}]"
    )
    return DenseScores(written["scores"], teacher.seen, store, teacher.device, ranks=owners)


@contextmanager
def _writing_together(store: Store, name: str, ranks: Ranks) -> Iterator[Path]:
    """The temporary folder of an entry of the store, the same on all ranks.

    It becomes the entry when all ranks have written their parts.
    """
    if not ranks.first:
        yield Path(ranks.broadcast(""))
        ranks.barrier()
    else:
        with store.writing(name) as folder:
            yield Path(ranks.broadcast(str(folder)))
            ranks.barrier()
    ranks.barrier()


def _write_dense(
    teacher: Scored, store: Store, name: str, dtype: str, show_progress: bool, ranks: Ranks
) -> None:
    """Write full rows of scores to disk, one block in memory at a time; ranks share the blocks."""
    shape = (teacher.n_contexts, teacher.n_items)
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize / 2**20
    wrong = [torch.zeros(0, dtype=torch.int64)]
    try:
        with _writing_together(store, name, ranks) as folder:
            # Plain writes: if a memory-mapped file does not fit on the disk, the process is killed,
            # without an exception. The file is not opened with "w", because another rank may have
            # begun to write.
            (folder / "scores.npy").touch()
            with (folder / "scores.npy").open("r+b") as file:
                np.lib.format.write_array_header_1_0(  # type: ignore[no-untyped-call]
                    file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                )
                header = file.tell()
                parts = islice(blocks(*shape), ranks.rank, None, ranks.world)
                total = -(-shape[0] // (ranks.world * max(1, CELLS_AT_A_TIME // shape[1])))
                for block in tqdm(
                    parts, total=total, ncols=100, desc="Teacher scores", disable=not show_progress
                ):
                    rows = teacher.score_all(block.to(teacher.device)).cpu()
                    rows[:, 0] = 0.0
                    with np.errstate(over="ignore"):  # an overflow of float16 is reported below
                        stored = rows.numpy().astype(dtype)
                    bad = ~np.isfinite(stored).all(1)
                    if not teacher.scores_rows:
                        bad[block.numpy() == 0] = False  # scores of the padding user mean nothing
                    wrong.append(block[torch.from_numpy(bad)])
                    file.seek(header + int(block[0]) * shape[1] * stored.itemsize)
                    file.write(np.ascontiguousarray(stored).tobytes())
            _require_finite(teacher, torch.cat(ranks.gather(torch.cat(wrong))).sort().values)
    except OSError as error:
        raise KDError(
            f"The teacher's scores ({size:.0f} MiB) could not be written to [{store.root}]: "
            f"{error.strerror or error}. Nothing was left there. Set kd_cache_dir to a larger "
            "disk, or kd_cache_dtype: float16."
        ) from error


def _require_finite_factors(teacher: Scored, users: Tensor, items: Tensor) -> None:
    bad_items = ~torch.isfinite(items[1:]).all(1)
    if bad_items.any():
        raise TeacherError(
            f"The teacher in [{teacher.source}] has NaN or infinite values for "
            f"{int(bad_items.sum())} items, so for all users. Its training diverged: train it "
            "again with a smaller learning rate."
        )
    bad = ~torch.isfinite(users).all(1)
    if not teacher.scores_rows:
        bad[0] = False
    _require_finite(teacher, bad.nonzero().squeeze(1).cpu())


def _require_finite(teacher: Scored, bad_users: Tensor) -> None:
    if len(bad_users):
        shown = ", ".join(teacher.user_tokens(bad_users[:5])) + (
            ", …" if len(bad_users) > 5 else ""
        )
        raise TeacherError(
            f"The teacher in [{teacher.source}] gives NaN or infinite scores to {len(bad_users)} "
            f"users: {shown}. Its training diverged: train it again with a smaller learning rate "
            "(or store its scores with kd_cache_dtype: float32, if they outgrow float16)."
        )
