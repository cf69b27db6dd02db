"""Sequential data on the same interactions as general models, and whole training sequences.

RecBole turns each user's sequence into one row per prefix and then splits the *rows*, while the
data of general models are split by *interactions*: a sequential teacher and a general student would
learn from different interactions. Here an interaction is given to a part (training, validation,
test) first, and each row then goes to the part of its target.
"""

from __future__ import annotations

import importlib
import pickle
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import recbole.data
import torch
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import ModelType, get_model, set_color
from recbole.utils.argument_list import dataset_arguments
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings

# Rows that are worked on at once: 50 items of each, in int64, take 26 MB.
_BLOCK = 2**16
# What a saved dataset must agree in: what RecBole compares, and what decides the split, which it
# reads from its own Config.
_SAVED_KEYS = (*dataset_arguments, "seed", "repeatable", "eval_args", "kd_sequence_split")
_ROW, _PART = "kd_row", "kd_part"


class SequenceDataset(SequentialDataset):  # type: ignore[misc]
    """RecBole's SequentialDataset, whose split may be one of interactions.

    * ``benchmark_filename`` is set and the files hold plain interactions (no ``item_id_list``): an
      interaction belongs to the part whose file holds it. A user's sequence is training, then
      validation, then test, whatever the time stamps; within a part by time, or as in the file if
      the data have no time stamps.
    * ``kd_sequence_split: interactions``: an interaction belongs to the part to which RecBole's
      split gives it for a general model with the same ``eval_args`` (order ``TO``).
    * else: RecBole's way, which splits the rows (or reads the lists from the files).

    In the first two cases a row goes to the part of its target. The history of a validation row is
    the training sequence and earlier validation items, that of a test row all those and earlier
    test items. As in RecBole, a user's first interaction has no row. The training split gets an
    attribute ``training_pairs``: users and items, ``[n]`` each, of all training interactions, also
    of those without a row. Rows of a ready split are ordered by user and place in the sequence,
    others as RecBole's split orders them: by time, then grouped by user.

    Args:
        config: RecBole's Config.

    Raises:
        SettingsError: ``kd_sequence_split`` is no known way, or asks for interactions in another
            order than ``TO``; or, when the rows are made, the data have no time stamps.
    """

    training_pairs: tuple[Tensor, Tensor]
    inter_feat: Any

    def __init__(self, config: Any) -> None:
        if _split_by_interactions(config) and config["eval_args"]["order"] != "TO":
            raise SettingsError(
                f"[eval_args] has order {config['eval_args']['order']!r}, but "
                "[kd_sequence_split]=interactions needs the order of time: set order: TO."
            )
        # Between _change_feat_format and build: the part of every row, and the training
        # interactions.
        self._parts: Any = None
        self._pairs: Any = None
        super().__init__(config)

    @property
    def _ready_split(self) -> bool:
        return self.benchmark_filename_list is not None

    def _lists_are_given(self) -> bool:
        return self._ready_split and self.iid_field + self.config["LIST_SUFFIX"] in self.inter_feat

    def _benchmark_presets(self) -> None:
        if self._lists_are_given():
            super()._benchmark_presets()

    def _change_feat_format(self) -> None:
        file_rows = self.inter_feat.index.to_numpy()  # which survive whatever filters drop
        super(SequentialDataset, self)._change_feat_format()
        if self._lists_are_given():
            return
        if not self._ready_split and self.time_field not in self.inter_feat:
            raise SettingsError(
                f"[TIME_FIELD] is {self.time_field!r}, but the interactions of "
                f"[{self.dataset_name}] have no such column, and a sequence needs an order: load "
                "the column ([load_col]), or give a ready split in order."
            )
        if self._ready_split:
            parts = np.searchsorted(np.cumsum(self.file_size_list), file_rows, side="right")
            self._parts = torch.from_numpy(parts)
        elif _split_by_interactions(self.config):
            self._parts = _Interactions(self).parts()
        self.data_augmentation()

    def data_augmentation(self) -> None:
        """Replace the interactions by one row per prefix of a user's sequence; all fields equal RecBole's own."""
        self._aug_presets()
        order = self._sequence_order()
        features = _take(self.inter_feat, order)
        users = features[self.uid_field]
        position = torch.arange(len(users))
        first = torch.ones(len(users), dtype=torch.bool)
        first[1:] = users[1:] != users[:-1]
        place = position - torch.where(first, position, 0).cummax(0).values
        targets = position[~first]
        lengths = place[targets].clamp(max=self.max_item_list_len)

        rows = _take(features, targets)
        rows.update(Interaction({self.item_list_length_field: lengths}))
        for field in features:
            if field != self.uid_field:
                lists = _windows(
                    features[field], targets - lengths, lengths, self.max_item_list_len
                )
                rows.update(Interaction({getattr(self, f"{field}_list_field"): lists}))
        self.inter_feat = rows
        if self._parts is not None:
            parts = self._parts[order]
            training = parts == 0
            self._pairs = users[training], features[self.iid_field][training]
            self._parts = parts[targets]

    def _sequence_order(self) -> Tensor:
        """The interactions by user, part and time; equal ones stay in their order."""
        keys = {self.uid_field: self.inter_feat[self.uid_field]}
        if self._parts is not None:
            keys[_PART] = self._parts
        if self.time_field in self.inter_feat:
            keys[self.time_field] = self.inter_feat[self.time_field]
        return _stable_order(keys)

    def build(self) -> list[Any]:
        """The training, validation and test split."""
        if self._lists_are_given() or not (
            self._ready_split or _split_by_interactions(self.config)
        ):
            built: list[Any] = super().build()
            return built
        self._change_feat_format()
        parts, pairs = self._parts, self._pairs
        self._parts = self._pairs = None  # no weight on the copies
        rows = torch.arange(len(self.inter_feat))
        if self._ready_split:
            n_parts = len(self.file_size_list)
        else:
            n_parts = 3
            rows = _stable_order({self.time_field: self.inter_feat[self.time_field]})
            # Numbered as they appear, which is how RecBole groups.
            users = torch.from_numpy(pd.factorize(self.inter_feat[self.uid_field][rows].numpy())[0])
            rows = rows[users.argsort(stable=True)]
        self._drop_unused_col()
        built = [
            self.copy(_take(self.inter_feat, rows[parts[rows] == part])) for part in range(n_parts)
        ]
        built[0].training_pairs = pairs
        return built


class _Interactions(Dataset):  # type: ignore[misc]
    """The interactions of a sequential dataset, as the dataset of a general model would split them: by RecBole's code."""

    def __init__(self, of: SequenceDataset) -> None:
        self.config, self.logger = of.config, of.logger
        self.uid_field, self.time_field = of.uid_field, of.time_field
        self.benchmark_filename_list = None
        columns = {
            field: of.inter_feat[field]
            for field in (of.uid_field, of.time_field)
            if field in of.inter_feat
        }
        self.inter_feat = Interaction({**columns, _ROW: torch.arange(len(of.inter_feat))})

    def _change_feat_format(self) -> None:
        """They are tensors already."""

    def _drop_unused_col(self) -> None:
        """There are none; those of the dataset are dropped with its rows."""

    def parts(self) -> Tensor:
        """The number of the part of each interaction, ``[n]``."""
        parts = torch.zeros(len(self), dtype=torch.int64)
        for number, part in enumerate(self.build()):
            parts[part.inter_feat[_ROW].long()] = number
        return parts


def create_dataset(config: Any) -> Any:
    """RecBole's ``create_dataset``, with a :class:`SequenceDataset` for sequential models whose data ask for one.

    They do if ``benchmark_filename`` names plain interactions, or ``kd_sequence_split`` is
    ``interactions``. A model's own ``<Model>Dataset``, in ``recbole.data.dataset`` or beside the
    model, is used if it is a SequenceDataset.

    Args:
        config: RecBole's Config; ``dataset_save_path`` and ``save_dataset`` work as in RecBole.

    Returns:
        The dataset, not built yet.

    Raises:
        SettingsError: a setting does not fit (see :class:`SequenceDataset`), or the model has a
            dataset of its own that cannot split so.
    """
    dataset_class = _dataset_class(config)
    if dataset_class is None:
        return recbole.data.create_dataset(config)
    default = Path(config["checkpoint_dir"]) / f"{config['dataset']}-{dataset_class.__name__}.pth"
    file = Path(config["dataset_save_path"] or default)
    if file.exists():
        with file.open("rb") as stream:
            saved = pickle.load(stream)
        if type(saved) is dataset_class and all(
            saved.config[key] == config[key] for key in _SAVED_KEYS
        ):
            getLogger().info(set_color("Load filtered dataset from", "pink") + f": [{file}]")
            return saved
    dataset = dataset_class(config)
    if config["save_dataset"]:
        dataset.save()
    return dataset


def training_pairs(dataset: Any) -> tuple[Tensor, Tensor]:
    """All training interactions behind a built training split, in no particular order.

    Args:
        dataset: the training split. Of a sequential one without the attribute ``training_pairs``,
            the interactions are the targets and the listed items of all rows, each (user, item)
            once.

    Returns:
        users and items, ``[n]`` each.
    """
    known: tuple[Tensor, Tensor] | None = getattr(dataset, "training_pairs", None)
    if known is not None:
        return known
    features = dataset.inter_feat
    users, items = (
        torch.as_tensor(np.asarray(features[field]))
        for field in (dataset.uid_field, dataset.iid_field)
    )
    lists = _list_fields(dataset).get(dataset.iid_field)
    if lists is None:
        return users, items
    n_items = int(dataset.item_num)
    keys = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(users), _BLOCK):
        rows = slice(start, start + _BLOCK)
        listed = torch.cat([items[rows, None], features[lists][rows]], dim=1)
        # Padding is item 0 and cannot be mistaken: no item has that id.
        keys.append(torch.unique((users[rows, None] * n_items + listed)[listed > 0]))
    pairs = torch.unique(torch.cat(keys))
    return pairs // n_items, pairs % n_items


def whole_sequences(
    dataset: Any, users: Tensor, fallback: tuple[Tensor, Tensor] | None = None
) -> Any:
    """Each user's whole training sequence, as a model reads it to say what comes next.

    The lists of the user's last training row, with the values of its target appended; the oldest
    entry is dropped where that is longer than ``MAX_ITEM_LIST_LENGTH``. A list whose plain column
    is gone (``unused_col``) is left out.

    Args:
        dataset: the built training split of a sequential dataset.
        users: user ids, ``[n]``.
        fallback: users and items, ``[m]`` each, in order of time: the sequences of users without a
            training row (who have one training interaction). Their other columns and lists are 0.

    Returns:
        An Interaction with one row per entry of ``users``: the user, every ``<field>_list``, their
        length, and the plain columns of the last row.

    Raises:
        TeacherError: some users have neither a training row nor a fallback.
    """
    users, features, width = users.cpu(), dataset.inter_feat, dataset.max_item_list_len
    row_users = features[dataset.uid_field]
    last = torch.full((int(dataset.user_num),), -1)
    last.scatter_reduce_(0, row_users, torch.arange(len(row_users)), "amax")
    has_row = last[users] >= 0

    rows = _take(features, last[users[has_row]])
    lengths = rows[dataset.item_list_length_field]
    for field, list_field in _list_fields(dataset).items():
        if field in rows:
            rows[list_field] = _appended(rows[list_field], rows[field], lengths, width)
        else:
            rows.drop(list_field)
    rows[dataset.item_list_length_field] = (lengths + 1).clamp(max=width)

    columns = {}
    for name in rows:
        columns[name] = rows[name].new_zeros(len(users), *rows[name].shape[1:])
        columns[name][has_row] = rows[name]
    columns[dataset.uid_field] = users
    if not has_row.all():
        others = users[~has_row]
        ends, lengths, items = _last_places(dataset, others, fallback)
        columns[dataset.iid_field][~has_row] = items[ends - 1]
        columns[dataset.item_list_length_field][~has_row] = lengths
        columns[_list_fields(dataset)[dataset.iid_field]][~has_row] = _windows(
            items, ends - lengths, lengths, width
        )
    return Interaction(columns)


def _last_places(
    dataset: Any, users: Tensor, pairs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Items grouped by user; where each user's group ends, and how many of its last items fit a list."""
    owners, items = (
        (torch.empty(0, dtype=torch.int64),) * 2
        if pairs is None
        else (pairs[0].cpu(), pairs[1].cpu())
    )
    counts = torch.bincount(owners, minlength=int(dataset.user_num))
    absent = torch.unique(users[counts[users] == 0])
    if len(absent):
        tokens = [
            str(dataset.field2id_token[dataset.uid_field][user]) for user in absent[:5].tolist()
        ]
        raise TeacherError(
            f"{len(absent)} users have no training sequence: "
            f"{', '.join(tokens)}{', …' if len(absent) > 5 else ''}. Ask for users with training "
            "interactions only, and give the pairs of those with a single one as [fallback]."
        )
    return (
        counts.cumsum(0)[users],
        counts[users].clamp(max=dataset.max_item_list_len),
        items[owners.argsort(stable=True)],
    )


def _appended(lists: Tensor, values: Tensor, lengths: Tensor, width: int) -> Tensor:
    """``lists [n, w, …]`` with one more of ``values [n, …]`` at each end; the oldest goes where there is no place."""
    grown = lists.new_zeros(len(lists), width + 1, *lists.shape[2:])
    grown[:, : lists.shape[1]] = lists
    grown[torch.arange(len(lists)), lengths] = values.to(lists.dtype)
    full = lengths == width
    grown[full, :-1] = grown[full, 1:]
    return grown[:, :width]


def _windows(values: Tensor, starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """``[n, width, …]``: ``lengths [n]`` rows of ``values [m, …]`` from ``starts [n]`` on, then zeros."""
    windows = values.new_zeros(len(starts), width, *values.shape[1:])
    for begin in range(0, len(starts), _BLOCK):
        block = torch.arange(begin, min(begin + _BLOCK, len(starts)))
        counts = lengths[block]
        row = torch.repeat_interleave(block, counts)
        column = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        windows[row, column] = values[starts[row] + column]
    return windows


def _take(features: Any, rows: Tensor) -> Any:
    """As ``features[rows]``, which would make a Python list of the row numbers."""
    return Interaction({name: features[name][rows] for name in features})


def _stable_order(keys: dict[str, Tensor]) -> Tensor:
    """Where each row of the table sorted by ``keys`` came from, by the sort of RecBole's own augmentation and split."""
    table = Interaction({**keys, _ROW: torch.arange(len(next(iter(keys.values()))))})
    table.sort(by=list(keys))
    order: Tensor = table[_ROW]
    return order


def _list_fields(dataset: Any) -> dict[str, str]:
    """``{"item_id": "item_id_list", …}`` of a sequential dataset that has its lists; empty for others.

    Without lists of negatives (DIEN), to which no column belongs.
    """
    end = "_list_field"
    found = {
        name.removesuffix(end): value for name, value in vars(dataset).items() if name.endswith(end)
    }
    if not found:
        return {}
    negative = dataset.config["NEG_PREFIX"]
    return {
        field: list_field
        for field, list_field in found.items()
        if list_field in dataset.inter_feat and not list_field.startswith(negative)
    }


def _split_by_interactions(config: Any) -> bool:
    way = config["kd_sequence_split"]
    return way is not None and KDSettings(kd_sequence_split=way).kd_sequence_split == "interactions"


def _dataset_class(config: Any) -> type[SequenceDataset] | None:
    """The SequenceDataset, or kind of it, that the data of this Config need; ``None``: RecBole's choice."""
    name = f"{config['model']}Dataset"
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        return None
    beside_model = importlib.import_module(get_model(config["model"]).__module__)
    own = getattr(recbole.data.dataset, name, None) or getattr(beside_model, name, None)
    if own is not None and issubclass(own, SequenceDataset):
        return own  # type: ignore[no-any-return]
    if not (
        _names_plain_files(config)
        or (config["benchmark_filename"] is None and _split_by_interactions(config))
    ):
        return None
    if own is not None:
        raise SettingsError(
            f"{config['model']} has data of its own ({name}), which only RecBole's split of rows "
            "fits: leave out [benchmark_filename] and [kd_sequence_split], or take another model."
        )
    return SequenceDataset


def _names_plain_files(config: Any) -> bool:
    """Whether the parts are files without lists; missing ones are left to RecBole's message."""
    if config["benchmark_filename"] is None:
        return False
    file = (
        Path(config["data_path"]) / f"{config['dataset']}.{config['benchmark_filename'][0]}.inter"
    )
    if not file.exists():
        return False
    with file.open(encoding=config["encoding"]) as stream:
        columns = stream.readline().rstrip("\n").split(config["field_separator"])
    return config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"] not in {
        column.split(":")[0] for column in columns
    }
