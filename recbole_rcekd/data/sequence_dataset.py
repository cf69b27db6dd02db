"""Sequential data with the same split as for general models, and whole training sequences.

RecBole makes one row of each prefix of a user's sequence and splits the *rows*, but it splits the
data of general models by *interactions*. So a sequential teacher and a general student would learn
from different interactions. Here each interaction is assigned to a part (training, validation or
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

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.data.sequences import take, windows

# A saved dataset is used only if these settings are the same: those that RecBole compares, and
# those that decide the split.
_SAVED_KEYS = (*dataset_arguments, "seed", "repeatable", "eval_args", "kd_sequence_split")
_ROW, _PART = "kd_row", "kd_part"


class SequenceDataset(SequentialDataset):  # type: ignore[misc]
    """RecBole's SequentialDataset, which can also split by interactions.

    * If ``benchmark_filename`` is set and the files have plain interactions (no ``item_id_list``),
      an interaction belongs to the part of its file. A user's sequence has the training items
      first, then validation, then test, whatever their time stamps. Within a part they are ordered
      by time, or as in the file if the data have no time stamps.
    * With ``kd_sequence_split: interactions``, an interaction belongs to the part that RecBole's
      split would give it for a general model with the same ``eval_args`` (order ``TO``).
    * Otherwise the split is RecBole's, by rows (or by the lists in the files).

    In the first two cases a row goes to the part of its target. The history of a validation row is
    the training sequence and the earlier validation items; a test row also has the earlier test
    items. As in RecBole, a user's first interaction has no row. The training split has an attribute
    ``training_pairs``: users and items, ``[n]`` each, of all training interactions, including those
    without a row. In the first case rows are ordered by user and position in the sequence, in the
    second as by RecBole's split: by time, then grouped by user.

    Args:
        config: RecBole's Config.

    Raises:
        SettingsError: ``kd_sequence_split`` is unknown, or is ``interactions`` while the order is
            not ``TO``; or the data have no time stamps (found when the rows are made).
    """

    training_pairs: tuple[Tensor, Tensor]
    inter_feat: Any

    def __init__(self, config: Any) -> None:
        if _split_by_interactions(config) and config["eval_args"]["order"] != "TO":
            raise SettingsError(
                f"[eval_args] has order {config['eval_args']['order']!r}, but "
                "[kd_sequence_split]=interactions needs the order of time: set order: TO."
            )
        # The part of each row, and the training interactions; from _change_feat_format to build.
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
        file_rows = self.inter_feat.index.to_numpy()  # unchanged by filters
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
        """Replace the interactions by one row per prefix of a sequence, with RecBole's fields."""
        self._aug_presets()
        order = self._sequence_order()
        features = take(self.inter_feat, order)
        users = features[self.uid_field]
        position = torch.arange(len(users))
        first = torch.ones(len(users), dtype=torch.bool)
        first[1:] = users[1:] != users[:-1]
        place = position - torch.where(first, position, 0).cummax(0).values
        targets = position[~first]
        lengths = place[targets].clamp(max=self.max_item_list_len)

        rows = take(features, targets)
        rows.update(Interaction({self.item_list_length_field: lengths}))
        for field in features:
            if field != self.uid_field:
                lists = windows(features[field], targets - lengths, lengths, self.max_item_list_len)
                rows.update(Interaction({getattr(self, f"{field}_list_field"): lists}))
        self.inter_feat = rows
        if self._parts is not None:
            parts = self._parts[order]
            training = parts == 0
            self._pairs = users[training], features[self.iid_field][training]
            self._parts = parts[targets]

    def _sequence_order(self) -> Tensor:
        """The interactions sorted by user, part and time; equal ones keep their order."""
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
        self._parts = self._pairs = None  # the copies below do not need them
        rows = torch.arange(len(self.inter_feat))
        if self._ready_split:
            n_parts = len(self.file_size_list)
        else:
            n_parts = 3
            rows = _stable_order({self.time_field: self.inter_feat[self.time_field]})
            # Users are numbered in the order in which they appear, as in RecBole's grouping.
            users = torch.from_numpy(pd.factorize(self.inter_feat[self.uid_field][rows].numpy())[0])
            rows = rows[users.argsort(stable=True)]
        self._drop_unused_col()
        built = [
            self.copy(take(self.inter_feat, rows[parts[rows] == part])) for part in range(n_parts)
        ]
        built[0].training_pairs = pairs
        if type(self) is SequenceDataset:
            # A built split is RecBole's class: GRU4RecF, FDSA, DIN and DIEN put it in their
            # checkpoints, which must open without this package.
            for part in built:
                part.__class__ = SequentialDataset
        return built


class _Interactions(Dataset):  # type: ignore[misc]
    """The interactions of a sequential dataset, split by RecBole's code for general models."""

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
        """Do nothing: the columns are tensors already."""

    def _drop_unused_col(self) -> None:
        """Do nothing: unused columns are dropped from the rows of the dataset."""

    def parts(self) -> Tensor:
        """The number of the part of each interaction, ``[n]``."""
        parts = torch.zeros(len(self), dtype=torch.int64)
        for number, part in enumerate(self.build()):
            parts[part.inter_feat[_ROW].long()] = number
        return parts


def create_dataset(config: Any) -> Any:
    """RecBole's ``create_dataset``, which makes a :class:`SequenceDataset` if it is needed.

    A sequential model needs it if ``benchmark_filename`` names plain interactions, or if
    ``kd_sequence_split`` is ``interactions``. A model's own ``<Model>Dataset``, in
    ``recbole.data.dataset`` or in the module of the model, is used if it is a SequenceDataset.

    Args:
        config: RecBole's Config; ``dataset_save_path`` and ``save_dataset`` work as in RecBole.

    Returns:
        The dataset, not built yet.

    Raises:
        SettingsError: a setting is refused (see :class:`SequenceDataset`), or the model has a
            dataset of its own that cannot split by interactions.
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


def way_of_split(config: Any) -> tuple[Any, ...]:
    """What decides whether rows or interactions are split: equal for equal splits.

    Args:
        config: RecBole's Config of a dataset.
    """
    return config["kd_sequence_split"] or "rows", config["benchmark_filename"]


def _stable_order(keys: dict[str, Tensor]) -> Tensor:
    """The order of rows sorted by ``keys``, with the sort of RecBole's augmentation and split."""
    table = Interaction({**keys, _ROW: torch.arange(len(next(iter(keys.values()))))})
    table.sort(by=list(keys))
    order: Tensor = table[_ROW]
    return order


def _split_by_interactions(config: Any) -> bool:
    way = config["kd_sequence_split"]
    return way is not None and KDSettings(kd_sequence_split=way).kd_sequence_split == "interactions"


def _dataset_class(config: Any) -> type[SequenceDataset] | None:
    """The SequenceDataset (or a subclass) that this Config needs; ``None``: RecBole's choice."""
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
    """Whether the parts are files without lists; a missing file is left to RecBole's message."""
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
