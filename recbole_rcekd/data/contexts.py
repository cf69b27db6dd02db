"""Users, or rows of sequential training data, as the Interactions that RecBole's models score.

A general model scores a user. A sequential model scores a *row*: a prefix of the user's sequence of
items, with its other columns. The rest of the package knows both by their numbers only, and calls
them *contexts*; here a number becomes a model's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import ModelType
from torch import Tensor

from recbole_rcekd.data.sequences import training_pairs, whole_sequences

# The column with the number of a training row, so that batches of RecBole's loader have it.
ROW_FIELD = "kd_row"
# Transformations of RecBole for training only; they take time.
_NOT_FOR_SCORING = ("mask_itemseq",)


class Contexts(Protocol):
    """The inputs of a model, numbered 0 to n − 1."""

    n: int

    def inputs(self, ids: Tensor) -> Interaction:
        """The inputs with these numbers, one row each."""
        ...


class Users:
    """Users by their ids; 0 is padding.

    Args:
        dataset: the dataset with the names of the id fields and the users' features.
        user_ids: for each user the id in the model's own data; ``None``: the same id.
        config: the Config of the model; default: the dataset's.
    """

    def __init__(self, dataset: Any, user_ids: Tensor | None = None, config: Any = None) -> None:
        self.n = int(dataset.user_num) if user_ids is None else len(user_ids)
        self._dataset = dataset
        self._user_ids = user_ids
        config = getattr(dataset, "config", None) if config is None else config
        # Only context-aware models read features of a user.
        self._with_features = config is not None and config["MODEL_TYPE"] == ModelType.CONTEXT

    def inputs(self, ids: Tensor) -> Interaction:
        """The ids of the users, and their features if the model reads them."""
        users = ids.long() if self._user_ids is None else self._user_ids.to(ids.device)[ids.long()]
        users_only = Interaction({self._dataset.uid_field: users})
        return (
            self._dataset.join(users_only).to(users.device) if self._with_features else users_only
        )


class Rows:
    """The rows of a sequential training set, as RecBole's loader would give them.

    Args:
        dataset: the training set.
        config: the Config of the model that reads the rows; default: the dataset's.
    """

    def __init__(self, dataset: Any, config: Any = None) -> None:
        self.n = len(dataset)
        self._dataset = dataset
        self._prepare = as_loaded(dataset.config if config is None else config)

    def inputs(self, ids: Tensor) -> Interaction:
        """The rows ``ids``, joined with features."""
        return self.translated(self._dataset.join(_taken(self._dataset, ids))).to(ids.device)

    def translated(self, rows: Interaction) -> Interaction:
        """Joined rows, as the model's loader would give them.

        They may also come from the validation and test data of the same dataset.
        """
        return self._prepare(self._dataset, rows)


class TranslatedRows:
    """The rows of a student's sequential training set, with the ids and list length of a teacher.

    Columns that the teacher's data do not have stay the same. Of a list that is too long, the last
    entries are kept.

    Args:
        dataset: the student's training set.
        other: the training set of the model that will read the rows, usually a teacher.
    """

    def __init__(self, dataset: Any, other: Any) -> None:
        self.n = len(dataset)
        self._dataset = dataset
        self._other = other
        self._prepare = as_loaded(other.config)
        self._ids = {
            field: ids_of_tokens(tokens, other.field2token_id[field])
            for field, tokens in dataset.field2id_token.items()
            if field in other.field2token_id
        }

    def inputs(self, ids: Tensor) -> Interaction:
        """The rows ``ids``, as the teacher's loader would give them."""
        return self.translated(_taken(self._dataset, ids)).to(ids.device)

    def translated(self, rows: Interaction) -> Interaction:
        """Rows of the student's data (also of its validation and test data), for the teacher."""
        suffix, other = self._dataset.config["LIST_SUFFIX"], self._other
        length_field, width = self._dataset.item_list_length_field, other.max_item_list_len
        lengths = rows[length_field]
        columns = {}
        for name in rows:
            field = name.removesuffix(suffix)
            column = rows[name]
            if field in self._ids:
                column = self._ids[field].to(column.device)[column.long()]
            columns[name] = _ends(column, lengths, width) if name != field else column
        columns[other.item_list_length_field] = lengths.clamp(max=width)
        for name in other.inter_feat:
            # Negatives for DIEN's loss, on which its scores do not depend
            if name.startswith(other.config["NEG_PREFIX"]):
                like = other.inter_feat[name]
                columns[name] = like.new_zeros(len(lengths), *like.shape[1:], device=lengths.device)
        return self._prepare(other, other.join(Interaction(columns)))


class WholeSequences:
    """Users by their ids, each with the whole training sequence, for a sequential model.

    Args:
        dataset: the model's training set.
        user_ids: for each user the id in the model's own data; ``None``: the same id.
    """

    def __init__(self, dataset: Any, user_ids: Tensor | None = None) -> None:
        self._users = torch.arange(int(dataset.user_num)) if user_ids is None else user_ids
        self.n = len(self._users)
        self._dataset = dataset
        self._prepare = as_loaded(dataset.config)

    @cached_property
    def _sequences(self) -> Interaction:
        pairs = training_pairs(self._dataset)
        known = torch.zeros(int(self._dataset.user_num), dtype=torch.bool)
        known[pairs[0]] = True
        # Padding and users without training data are never scored: they get any sequence.
        users = torch.where(known[self._users], self._users, pairs[0][0])
        return whole_sequences(self._dataset, users, fallback=pairs)

    def inputs(self, ids: Tensor) -> Interaction:
        """The sequences of the users ``ids``."""
        sequences = self._sequences
        rows = Interaction({name: sequences[name][ids.long().cpu()] for name in sequences})
        return self._prepare(self._dataset, self._dataset.join(rows)).to(ids.device)


def of_training(dataset: Any) -> Contexts:
    """The rows of a sequential training set, or the users of any other."""
    return Rows(dataset) if is_sequential(dataset) else Users(dataset)


def is_sequential(dataset: Any) -> bool:
    """Whether the rows of a dataset are sequences."""
    return hasattr(dataset, "item_list_length_field")


@contextmanager
def row_ids_in_batches(dataset: Any) -> Iterator[None]:
    """Within the block, a training set and its batches have the numbers of rows as ``kd_row``."""
    features = dataset.inter_feat
    if ROW_FIELD in features:  # two trainers may use the same data in turn
        yield
        return
    features.update(Interaction({ROW_FIELD: torch.arange(len(features))}))
    try:
        yield
    finally:
        features.drop(ROW_FIELD)


def as_loaded(config: Any) -> Any:
    """RecBole's transformation of batches as a function ``(dataset, rows) -> rows``.

    A transformation for training only is left out.
    """
    if config["transform"] in _NOT_FOR_SCORING:
        return lambda dataset, rows: rows
    return construct_transform(config)


def ids_of_tokens(tokens: Any, ids: Any) -> Tensor:
    """For each token its id in another dataset, or 0 if that dataset does not have it."""
    return torch.tensor([ids.get(token, 0) for token in tokens], dtype=torch.int64)


def _taken(dataset: Any, ids: Tensor) -> Interaction:
    """Rows of a training set without joined features.

    ``dataset[ids]`` would make a Python list of the ids.
    """
    features = dataset.inter_feat
    return Interaction(
        {name: features[name][ids.long().to(features[name].device)] for name in features}
    )


def _ends(lists: Tensor, lengths: Tensor, width: int) -> Tensor:
    """``lists [n, w, …]`` padded to ``width``, or cut to their last entries."""
    start = (lengths - width).clamp(min=0).unsqueeze(1)
    place = torch.arange(width, device=lists.device)
    inside = (place < lengths.unsqueeze(1)).view(len(lists), width, *[1] * (lists.dim() - 2))
    index = (start + place).clamp(max=lists.shape[1] - 1)
    return lists[torch.arange(len(lists), device=lists.device).unsqueeze(1), index].where(inside, 0)
