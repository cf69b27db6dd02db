"""Who is scored: users, or rows of sequential training data, as the Interactions that RecBole's models take.

Scores, lists and item sets know contexts by number only; here a number becomes a model's input. A
general model scores a user, a sequential one a *row*: a sequence of items (a prefix of what the
user took) and what goes with it.
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

from recbole_rcekd.data.sequence_dataset import training_pairs, whole_sequences

# The column in which a training row carries its number through RecBole's loader.
ROW_FIELD = "kd_row"
# What RecBole adds to rows for training only, at some cost.
_NOT_FOR_SCORING = ("mask_itemseq",)


class Contexts(Protocol):
    """Numbers 0 to n − 1, each a model's input."""

    n: int

    def inputs(self, ids: Tensor) -> Interaction:
        """One row per id."""
        ...


class Users:
    """Users by their ids; 0 is padding.

    Args:
        dataset: names the id fields and holds the users' features.
        user_ids: for each context the model's own id; ``None``: the same.
        config: of the model that is asked; default: the dataset's.
    """

    def __init__(self, dataset: Any, user_ids: Tensor | None = None, config: Any = None) -> None:
        self.n = int(dataset.user_num) if user_ids is None else len(user_ids)
        self._dataset = dataset
        self._user_ids = user_ids
        config = getattr(dataset, "config", None) if config is None else config
        # Only context-aware models read more of a user than the id.
        self._with_features = config is not None and config["MODEL_TYPE"] == ModelType.CONTEXT

    def inputs(self, ids: Tensor) -> Interaction:
        """User ids, and features where the model reads them."""
        users = ids.long() if self._user_ids is None else self._user_ids.to(ids.device)[ids.long()]
        users_only = Interaction({self._dataset.uid_field: users})
        return (
            self._dataset.join(users_only).to(users.device) if self._with_features else users_only
        )


class Rows:
    """The rows of a sequential training set, as RecBole's loader would give them.

    Args:
        dataset: the training set.
        config: of the model that reads them; default: the dataset's.
    """

    def __init__(self, dataset: Any, config: Any = None) -> None:
        self.n = len(dataset)
        self._dataset = dataset
        self._prepare = as_loaded(dataset.config if config is None else config)

    def inputs(self, ids: Tensor) -> Interaction:
        """Rows ``ids``, joined with features."""
        return self.translated(self._dataset.join(_taken(self._dataset, ids))).to(ids.device)

    def translated(self, rows: Interaction) -> Interaction:
        """Joined rows of the same data, also of its validation and test data, as the model's loader would give them."""
        return self._prepare(self._dataset, rows)


class TranslatedRows:
    """The rows of a student's sequential training set, in the ids and the list length of another model.

    Columns that the other model's data lack stay as they are. A list that is too long keeps its
    end.

    Args:
        dataset: the student's training set.
        other: the training set of the model that is to read the rows.
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
        """Rows ``ids``, as the other model's loader would give them."""
        return self.translated(_taken(self._dataset, ids)).to(ids.device)

    def translated(self, rows: Interaction) -> Interaction:
        """Rows of the student's data, also of its validation and test data."""
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
            if name.startswith(
                other.config["NEG_PREFIX"]
            ):  # drawn for DIEN's loss; its scores do not depend on them
                like = other.inter_feat[name]
                columns[name] = like.new_zeros(len(lengths), *like.shape[1:], device=lengths.device)
        return self._prepare(other, other.join(Interaction(columns)))


class WholeSequences:
    """Users by their ids, each with the whole training sequence, for a sequential model.

    Args:
        dataset: the model's training set.
        user_ids: for each context the model's own user id; ``None``: the same.
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
        # Padding, and users without training data, whom nothing is asked about: any sequence does.
        users = torch.where(known[self._users], self._users, pairs[0][0])
        return whole_sequences(self._dataset, users, fallback=pairs)

    def inputs(self, ids: Tensor) -> Interaction:
        """The sequences of ``ids``."""
        sequences = self._sequences
        rows = Interaction({name: sequences[name][ids.long().cpu()] for name in sequences})
        return self._prepare(self._dataset, self._dataset.join(rows)).to(ids.device)


def of_training(dataset: Any) -> Contexts:
    """What a student learns on: the rows of a sequential training set, the users of any other."""
    return Rows(dataset) if is_sequential(dataset) else Users(dataset)


def is_sequential(dataset: Any) -> bool:
    """Whether its rows are sequences."""
    return hasattr(dataset, "item_list_length_field")


@contextmanager
def row_ids_in_batches(dataset: Any) -> Iterator[None]:
    """While this lasts, the rows of a training set carry their numbers in the column ``kd_row``, also out of the loader."""
    features = dataset.inter_feat
    if ROW_FIELD in features:  # two trainers may take turns on the same data
        yield
        return
    features.update(Interaction({ROW_FIELD: torch.arange(len(features))}))
    try:
        yield
    finally:
        features.drop(ROW_FIELD)


def as_loaded(config: Any) -> Any:
    """``(dataset, rows) -> rows``: RecBole's transformation of batches, apart from what is for training alone."""
    if config["transform"] in _NOT_FOR_SCORING:
        return lambda dataset, rows: rows
    return construct_transform(config)


def ids_of_tokens(tokens: Any, ids: Any) -> Tensor:
    """For each token its id in another dataset; 0 where that does not know it."""
    return torch.tensor([ids.get(token, 0) for token in tokens], dtype=torch.int64)


def _taken(dataset: Any, ids: Tensor) -> Interaction:
    """Rows of a training set, without joined features; not through a Python list, as ``dataset[ids]`` goes."""
    features = dataset.inter_feat
    return Interaction(
        {name: features[name][ids.long().to(features[name].device)] for name in features}
    )


def _ends(lists: Tensor, lengths: Tensor, width: int) -> Tensor:
    """``lists [n, w, …]`` cut, or padded, to ``width``; of what is too long the last entries are kept."""
    start = (lengths - width).clamp(min=0).unsqueeze(1)
    place = torch.arange(width, device=lists.device)
    inside = (place < lengths.unsqueeze(1)).view(len(lists), width, *[1] * (lists.dim() - 2))
    index = (start + place).clamp(max=lists.shape[1] - 1)
    return lists[torch.arange(len(lists), device=lists.device).unsqueeze(1), index].where(inside, 0)
