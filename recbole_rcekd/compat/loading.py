"""RecBole's training batches, made faster and with the same content.

A third of a training epoch of a small model is spent in loops over the rows of a batch: row numbers
are shuffled, batched and copied one by one, they become a Python list again before each column is
indexed, and every drawn negative is looked up in a Python set. :func:`fast_batches` replaces these
loops while an epoch runs. Every draw, and so every batch, stays the same
(``tests/compat/test_loading.py`` compares them).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.sampler.sampler import AbstractSampler
from torch.utils.data import BatchSampler, RandomSampler

from recbole_rcekd.compat.instances import replaced

_INDEX_ROWS = Interaction.__getitem__
_SAMPLE = AbstractSampler.sample_by_key_ids
# Knuth's multiplier, which puts neighbouring keys far apart.
_MULTIPLIER = np.uint64(11400714819323198485)


@contextmanager
def fast_batches(train_data: Any) -> Iterator[None]:
    """Within the block, RecBole's training batches are made faster.

    Args:
        train_data: RecBole's training loader.
    """
    loaders = [
        train_data,
        *(getattr(train_data, f"{part}_dataloader", None) for part in ("general", "kg")),
    ]
    with ExitStack() as stack:
        stack.enter_context(patch.object(Interaction, "__getitem__", _index_rows))
        stack.enter_context(patch.object(AbstractSampler, "sample_by_key_ids", _sample_by_key_ids))
        for loader in loaders:
            # The data of a loader are the row numbers 0 to n − 1; RecBole's collate_fn gets some of
            # them for each batch.
            numbers = vars(loader).get("dataset") if loader is not None else None
            if (
                isinstance(numbers, list)
                and len(numbers)
                and numbers[0] == 0
                and numbers[-1] == len(numbers) - 1
            ):
                stack.enter_context(replaced(loader, "dataset", _RowNumbers(numbers)))
                if (
                    type(loader.sampler) is RandomSampler
                    and type(loader.batch_sampler) is BatchSampler
                ):
                    stack.enter_context(replaced(loader, "batch_sampler", _ShuffledBatches(loader)))
        yield


class _RowNumbers:
    """The row numbers 0 to n − 1, fetched a whole batch at a time.

    Torch's loader uses ``__getitems__`` if there is one.
    """

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


class _ShuffledBatches:
    """The batches of torch's ``RandomSampler`` and ``BatchSampler``, as slices of one shuffle."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._batches = loader.batch_sampler

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        n, size, generator = (
            len(self._loader.sampler),
            self._batches.batch_size,
            self._loader.generator,
        )
        *batches, last = torch.split(torch.randperm(n, generator=generator), size)
        for batch in batches:
            yield batch.numpy()
        # At its end RandomSampler shuffles once more and uses none of it. It reaches its end while
        # it fills an incomplete last batch, or after a full one. (The order matters for a loader
        # that stops earlier, as KnowledgeBasedDataLoader does.)
        if len(last) == size:
            yield last.numpy()
        torch.randperm(n, generator=generator)
        if len(last) < size:
            yield last.numpy()


def _index_rows(self: Any, index: Any) -> Any:
    """``Interaction[index]`` without making a Python list of it (data/interaction.py:136)."""
    if isinstance(index, np.ndarray) and index.dtype == np.int64:
        index = torch.from_numpy(index)
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        return _INDEX_ROWS(self, index)
    return Interaction(
        {name: column[index.to(column.device)] for name, column in self.interaction.items()}
    )


def _sample_by_key_ids(self: Any, key_ids: Any, num: int) -> Any:
    """``sample_by_key_ids`` that looks in Python's sets only for ids that may be used.

    RecBole looks there for every drawn id (sampler/sampler.py:176).
    """
    key_ids = np.array(key_ids)
    one_key = len(key_ids) and (key_ids == key_ids[0]).all()
    if one_key or len(key_ids) == 0 or key_ids.min() < 0 or key_ids.max() >= len(self.used_ids):
        return _SAMPLE(self, key_ids, num)
    used_ids, maybe_used = self.used_ids, _marks_of(self)
    key_ids = np.tile(key_ids, num)
    value_ids = np.zeros(len(key_ids), dtype=np.int64)
    open_ones = np.arange(len(key_ids))
    while len(open_ones) > 0:
        value_ids[open_ones] = self.sampling(len(open_ones))
        suspects = open_ones[
            maybe_used[_slots(key_ids[open_ones], value_ids[open_ones], len(maybe_used))]
        ]
        open_ones = np.array(
            [i for i in suspects if value_ids[i] in used_ids[key_ids[i]]], dtype=np.int64
        )
    return torch.tensor(value_ids, dtype=torch.long)


def _marks_of(sampler: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Marks at the slots of all used (key, id) pairs, made once.

    A pair whose slot is not marked is not used.
    """
    known = vars(sampler).get("_used_marks")
    if known is not None and known[0] is sampler.used_ids:
        return known[1]  # type: ignore[no-any-return]
    counts = np.fromiter(map(len, sampler.used_ids), np.int64, len(sampler.used_ids))
    ids = np.fromiter(chain.from_iterable(sampler.used_ids), np.int64, counts.sum())
    # Eight to sixteen slots for a pair, so that at most about one unused pair in eight is marked.
    marks = np.zeros(1 << max(16, int(8 * len(ids)).bit_length()), dtype=bool)
    marks[_slots(np.repeat(np.arange(len(counts)), counts), ids, len(marks))] = True
    sampler._used_marks = (sampler.used_ids, marks)
    return marks


def _slots(
    keys: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], n_slots: int
) -> np.ndarray[Any, Any]:
    """The slot of each pair, by multiplicative hashing; ``n_slots`` is a power of two."""
    mixed = (keys.astype(np.uint64) * _MULTIPLIER + ids.astype(np.uint64)) * _MULTIPLIER
    return mixed >> np.uint64(64 - n_slots.bit_length() + 1)
