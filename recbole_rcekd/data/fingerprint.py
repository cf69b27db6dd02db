"""Hashes of training data, by which those of teacher and student are compared.

A teacher is refused unless its *training interactions* are the student's. In RecBole the split
depends on the random seed, so a teacher with another seed has most likely learned from items of the
student's test set, and would leak them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from torch import Tensor

from recbole_rcekd.core.store import file_checksum
from recbole_rcekd.core.types import Seen
from recbole_rcekd.data.contexts import ROW_FIELD, is_sequential
from recbole_rcekd.data.sequences import training_pairs


def training_interactions(dataset: Any) -> Seen:
    """The items of each user in the training data."""
    users, items = training_pairs(dataset)
    return Seen.from_pairs(users, items, int(dataset.user_num), int(dataset.item_num))


def split_hash(dataset: Any) -> str:
    """A hash of the training interactions and of the tokens of the ids."""
    seen = training_interactions(dataset)
    digest = hashlib.sha256(seen.starts.numpy().tobytes())
    digest.update(seen.ids.numpy().tobytes())
    for field in (dataset.uid_field, dataset.iid_field):
        digest.update("\n".join(map(str, dataset.field2id_token[field])).encode())
    return digest.hexdigest()[:32]


def feature_hash(dataset: Any) -> str:
    """A hash of all that models read except the ids.

    These are the features of users and items, and for sequential data also the rows in their order.
    """
    digest = hashlib.sha256()
    tables = [dataset.user_feat, dataset.item_feat]
    if is_sequential(dataset):
        tables.append(dataset.inter_feat)
    for table in tables:
        columns = (
            {} if table is None else {name: table[name] for name in table if name != ROW_FIELD}
        )
        hash_value(digest, columns)
    return digest.hexdigest()[:32]


def hash_value(digest: Any, value: Any) -> None:
    """Add a value to a hashlib digest: a tensor, numpy array, scipy matrix, or a dict of them."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}=".encode())
            hash_value(digest, value[key])
    elif isinstance(value, Tensor):
        hash_value(digest, value.detach().cpu().numpy())
    elif scipy.sparse.issparse(value):
        coordinates = value.tocoo()
        for part in (coordinates.row, coordinates.col, coordinates.data):
            hash_value(digest, part)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(f"{value!r};".encode())


def data_files_hash(config: Any) -> str:
    """A hash of the files of a dataset, of all that a training or a test could read.

    Args:
        config: RecBole's Config with the names of the folder and the dataset.
    """
    files = sorted(Path(config["data_path"]).glob(f"{config['dataset']}.*"))
    return hashlib.sha256(
        json.dumps([[f.name, file_checksum(f)] for f in files if f.is_file()]).encode()
    ).hexdigest()[:32]
