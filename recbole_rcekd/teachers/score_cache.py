"""Teacher scores, computed once: two tables where the teacher is a product, a memory-mapped matrix where it is not.

* :class:`FactorScores`: for BPR, LightGCN and all others whose scores are dot products. Exact,
  small ((users + items) × d), any cell on demand.
* :class:`DenseScores`: for the rest (NeuMF, auto-encoders, item-based models): users × items on
  disk, mapped, so that memory grows with what is read at a time.

:func:`open_teacher_scores` finds either on disk, under a name that hashes all that made it, or
makes it. The teacher is not touched on a hit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import KDError, TeacherError
from recbole_rcekd.core.functional import full_precision, picked_products
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.store import Store
from recbole_rcekd.core.top_k import CELLS_AT_A_TIME, ProductRanking, Ranking, RowRanking
from recbole_rcekd.core.types import Seen, TeacherScores


class Scored(Protocol):
    """What is asked of a teacher whose scores are computed and stored."""

    source: str
    device: torch.device
    n_items: int
    for_rows: bool
    scores_rows: bool

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the scores."""
        ...

    @property
    def n_contexts(self) -> int:
        """How many users (or rows), padding included."""
        ...

    @property
    def seen(self) -> Seen:
        """What lists of unseen items leave out."""
        ...

    def score_all(self, contexts: Tensor) -> Tensor:
        """Full rows of scores, ``[n, n_items]``."""
        ...

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Two tables whose product the scores are, if any."""
        ...

    def user_tokens(self, contexts: Tensor) -> list[str]:
        """Names of users, for messages."""
        ...

    def release(self) -> None:
        """Give back memory that only computing scores needs."""
        ...


class Scores(TeacherScores):
    """What both kinds share: best-of lists, made for all contexts at once and kept, in memory and on disk.

    With several ranks each makes and holds the lists of its own contexts; on disk they are whole.
    """

    def __init__(
        self,
        n_contexts: int,
        n_items: int,
        seen: Seen,
        store: Store | None,
        side: str,
        ranks: Ranks,
    ) -> None:
        self.n_contexts = n_contexts
        self.n_items = n_items
        self._seen = seen
        self._store = store
        self._side = side
        self._ranks = ranks
        self._lists: dict[bool, Tensor] = {}

    @abstractmethod
    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """Scores ``[n, T]`` (float32) of ``items [n, T]`` for ``contexts [n]``."""

    @abstractmethod
    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` (float32) of every item; −inf at the padding item."""

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """Ids ``[n, k]`` of the best items, best first; 0 where there are fewer than ``k``.

        With several ranks: of contexts that this rank owns, and all ranks ask for the same ``k``
        first.
        """
        width = min(k, self.n_items - 1)
        lists = self._lists.get(unseen)
        if lists is None or lists.shape[1] < width:
            lists = self._lists[unseen] = self._open_lists(width, unseen).to(contexts.device)
        return torch.nn.functional.pad(
            lists[self._ranks.row(contexts), :width].long(), (0, k - width)
        )

    def _open_lists(self, k: int, unseen: bool) -> Tensor:
        name = f"top-{k}-{'unseen' if unseen else 'all'}-{self._side}{self._rounded}"
        alone = self._ranks.world == 1
        found = self._store.read(name, mmap=not alone) if self._store else None
        # They decide together: what one rank does not find, all make.
        if self._ranks.all(found is not None) and found is not None:
            ids = found["ids"]
            return torch.from_numpy(
                ids if alone else np.array(ids[self._ranks.rank :: self._ranks.world])
            )
        lists = self._make_lists(k, unseen)
        if self._store:
            whole = self._ranks.whole(lists, self.n_contexts)
            if whole is not None:
                _write_if_possible(self._store, name, {"ids": whole.numpy()})
        return lists

    @property
    def _rounded(self) -> str:
        """How the scores are rounded, for the names of their lists: another dtype has other ties."""
        return ""

    def _make_lists(self, k: int, unseen: bool) -> Tensor:
        own = self._ranks.own(torch.arange(self.n_contexts))
        getLogger().info(
            f"Teacher lists: the best {k} items of {len(own)} users or sequences, made once"
        )
        return self._ranking().top_k(own, k, self._seen if unseen else None).int().cpu()

    def _ranking(self) -> Ranking:
        return RowRanking(self.score_all, self.n_items)


class FactorScores(Scores):
    """Scores that are dot products of two tables.

    Args:
        context_factors: ``[n_contexts, d]`` float32, row 0 is padding.
        item_factors: ``[n_items, d]`` float32, row 0 is padding.
        seen: the training interactions, for lists of unseen items.
        store: where lists are kept between runs; ``None``: in memory only.
        side: names the contexts in the store.
        ranks: this process among those that share the lists out.
    """

    def __init__(
        self,
        context_factors: Tensor,
        item_factors: Tensor,
        seen: Seen,
        store: Store | None = None,
        side: str = "users",
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(
            len(context_factors), len(item_factors), seen, store, side, ranks or Ranks()
        )
        self.context_factors = context_factors
        self.item_factors = item_factors

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return picked_products(self.context_factors[contexts], self.item_factors, items)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        with full_precision(self.item_factors.device):
            scores = self.context_factors[contexts] @ self.item_factors.t()
        scores[:, 0] = -torch.inf
        return scores

    def _ranking(self) -> Ranking:
        return ProductRanking(lambda contexts: self.context_factors[contexts], self.item_factors)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self.context_factors, self.item_factors

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; from mean and covariance of items."""
        mean_row, others = centred(self.item_factors)
        rows = self.context_factors.double()
        covariance = others[1:].t() @ others[1:] / (self.n_items - 1)
        mean, variance = rows @ mean_row, ((rows @ covariance) * rows).sum(1).clamp(min=0.0)
        size = rows.norm(dim=1) * self.item_factors[1:].double().square().sum(1).mean().sqrt()
        return mean, variance, size

    def transposed(self) -> FactorScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return FactorScores(
            self.item_factors,
            self.context_factors,
            self._seen.transposed(),
            self._store,
            side=f"by-{self._side}",
            ranks=self._ranks,
        )


class DenseScores(Scores):
    """Scores as a matrix on disk, mapped into memory.

    Args:
        matrix: ``[n_contexts, n_items]`` float16 or float32, as ``np.load(..., mmap_mode="r")``
            gives it.
        seen: the training interactions, for lists of unseen items.
        store: where lists are kept between runs; ``None``: in memory only.
        device: where scores are wanted.
        side: names the contexts in the store.
        ranks: this process among those that share the lists out.
    """

    def __init__(
        self,
        matrix: np.ndarray[Any, Any],
        seen: Seen,
        store: Store | None = None,
        device: torch.device | None = None,
        side: str = "users",
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(matrix.shape[0], matrix.shape[1], seen, store, side, ranks or Ranks())
        self._matrix = matrix
        self._device = device or torch.device("cpu")

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        cells = self._matrix[contexts.cpu().numpy()[:, None], items.cpu().numpy()]
        return torch.from_numpy(cells.astype(np.float32)).to(self._device)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        rows = torch.from_numpy(self._matrix[contexts.cpu().numpy()].astype(np.float32)).to(
            self._device
        )
        rows[:, 0] = -torch.inf
        return rows

    @property
    def _rounded(self) -> str:
        return f"-{self._matrix.dtype}"

    def transposed(self) -> DenseScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        side = f"by-{self._side}"
        return DenseScores(
            self._matrix.T, self._seen.transposed(), self._store, self._device, side, self._ranks
        )


def open_teacher_scores(
    teacher: Scored, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
) -> FactorScores | DenseScores:
    """The teacher's scores, from disk if they are there, computed and stored if not.

    Args:
        teacher: asked for scores on a miss only.
        settings: ``kd_cache_dir``, ``kd_cache_dtype``.
        show_progress: a progress bar while scores are computed.
        ranks: this process among those that need the scores; they share the work out.

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
    # Users belong to a rank each, and their lists with them; the rows of a sequential student come
    # to any.
    owners = Ranks() if teacher.for_rows else ranks
    dense_name = f"dense-{settings.kd_cache_dtype}"
    found = store.read("factors")
    # They decide together: what one rank does not find, all make.
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
            _write_if_possible(store, "factors", dict(zip(("users", "items"), tables, strict=True)))
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


def blocks(n_contexts: int, n_items: int, cells: int = CELLS_AT_A_TIME) -> Iterator[Tensor]:
    """All ids from 0 to ``n_contexts``, in blocks whose full rows hold about ``cells`` scores."""
    step = max(1, cells // n_items)
    for start in range(0, n_contexts, step):
        yield torch.arange(start, min(start + step, n_contexts))


def _write_if_possible(store: Store, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    try:
        store.write(name, arrays)
    except OSError as error:
        getLogger().warning(
            f"The teacher's scores could not be kept in [{store.root}] "
            f"({error.strerror or error}); this run goes on with them in memory, the next will "
            "compute them again."
        )


@contextmanager
def _writing_together(store: Store, name: str, ranks: Ranks) -> Iterator[Path]:
    """The scratch folder of an entry, on all ranks; it becomes the entry when all have written their part."""
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
    """Stream full rows to disk, one block in memory at a time; ranks take turns with the blocks."""
    shape = (teacher.n_contexts, teacher.n_items)
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize / 2**20
    wrong = [torch.zeros(0, dtype=torch.int64)]
    try:
        with _writing_together(store, name, ranks) as folder:
            # Plain writes: a mapped file that outgrows the disk would kill the process instead of
            # raising.
            (
                folder / "scores.npy"
            ).touch()  # not opened as new, for another rank may have begun to write
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
                    with np.errstate(over="ignore"):  # what outgrows float16 is reported below
                        stored = rows.numpy().astype(dtype)
                    bad = ~np.isfinite(stored).all(1)
                    if not teacher.scores_rows:
                        bad[block.numpy() == 0] = False  # the padding user has no meaning
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


def centred(table: Tensor) -> tuple[Tensor, Tensor]:
    """The mean row, and the table less it, in float64; padding counts nowhere and becomes 0."""
    exact = table.double()
    mean = exact[1:].mean(0)
    centred = exact - mean
    centred[0] = 0.0
    return mean, centred
