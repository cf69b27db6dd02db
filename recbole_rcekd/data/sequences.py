"""Sequences as tensors: a user's whole history, windows of it, and the interactions behind rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_rcekd.core.errors import TeacherError

# Rows that are processed at once: with 50 items each, in int64, they take 26 MB.
_BLOCK = 2**16


def training_pairs(dataset: Any) -> tuple[Tensor, Tensor]:
    """All training interactions of a built training split, in no particular order.

    Args:
        dataset: the training split. If it is sequential and has no attribute ``training_pairs``,
            the interactions are the targets and the listed items of all rows, each pair of a user
            and an item once.

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
        # Padding has id 0, as no item has.
        keys.append(torch.unique((users[rows, None] * n_items + listed)[listed > 0]))
    pairs = torch.unique(torch.cat(keys))
    return pairs // n_items, pairs % n_items


def whole_sequences(
    dataset: Any, users: Tensor, fallback: tuple[Tensor, Tensor] | None = None
) -> Any:
    """Each user's whole training sequence, as the input from which a model predicts the next item.

    These are the lists of the user's last training row, with the values of its target appended. If
    a list is then longer than ``MAX_ITEM_LIST_LENGTH``, its oldest entry is dropped. A list whose
    column was dropped (``unused_col``) is left out.

    Args:
        dataset: the built training split of a sequential dataset.
        users: user ids, ``[n]``.
        fallback: users and items, ``[m]`` each, in order of time: the sequences of users without a
            training row (who have one training interaction). Their other columns and lists are 0.

    Returns:
        An Interaction with one row per entry of ``users``: the user, every ``<field>_list``, their
        length, and the other columns of the last row.

    Raises:
        TeacherError: some users have neither a training row nor a fallback.
    """
    users, features, width = users.cpu(), dataset.inter_feat, dataset.max_item_list_len
    row_users = features[dataset.uid_field]
    last = torch.full((int(dataset.user_num),), -1)
    last.scatter_reduce_(0, row_users, torch.arange(len(row_users)), "amax")
    has_row = last[users] >= 0

    rows = take(features, last[users[has_row]])
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
        columns[_list_fields(dataset)[dataset.iid_field]][~has_row] = windows(
            items, ends - lengths, lengths, width
        )
    return Interaction(columns)


def _last_places(
    dataset: Any, users: Tensor, pairs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each user's items end, how many of them fit in a list, and all items by user."""
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
    """``lists [n, w, …]`` with one of ``values [n, …]`` appended to each.

    If a list is full, its oldest entry is dropped.
    """
    grown = lists.new_zeros(len(lists), width + 1, *lists.shape[2:])
    grown[:, : lists.shape[1]] = lists
    grown[torch.arange(len(lists)), lengths] = values.to(lists.dtype)
    full = lengths == width
    grown[full, :-1] = grown[full, 1:]
    return grown[:, :width]


def windows(values: Tensor, starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Windows ``[n, width, …]`` of ``values [m, …]``, filled up with zeros.

    Each has ``lengths [n]`` values from ``starts [n]`` on.
    """
    windows = values.new_zeros(len(starts), width, *values.shape[1:])
    for begin in range(0, len(starts), _BLOCK):
        block = torch.arange(begin, min(begin + _BLOCK, len(starts)))
        counts = lengths[block]
        row = torch.repeat_interleave(block, counts)
        column = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        windows[row, column] = values[starts[row] + column]
    return windows


def take(features: Any, rows: Tensor) -> Any:
    """The same as ``features[rows]``, which would make a Python list of the row numbers."""
    return Interaction({name: features[name][rows] for name in features})


def _list_fields(dataset: Any) -> dict[str, str]:
    """``{"item_id": "item_id_list", …}`` of a sequential dataset; empty for other datasets.

    Lists of negatives (DIEN) are left out: they belong to no column.
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
