"""The training data of teacher and student: what they are known by, and whether they are the same.

A teacher is refused unless its *training interactions* are the student's. In RecBole the random
seed is part of the split, so a teacher of another seed has most likely seen the student's test set,
and its knowledge would leak.
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
from recbole_rcekd.data.sequence_dataset import training_pairs


def training_interactions(dataset: Any) -> Seen:
    """Which items each user has in the training data."""
    users, items = training_pairs(dataset)
    return Seen.from_pairs(users, items, int(dataset.user_num), int(dataset.item_num))


def split_hash(dataset: Any) -> str:
    """A hash of the training interactions and of the names behind the ids."""
    seen = training_interactions(dataset)
    digest = hashlib.sha256(seen.starts.numpy().tobytes())
    digest.update(seen.ids.numpy().tobytes())
    for field in (dataset.uid_field, dataset.iid_field):
        digest.update("\n".join(map(str, dataset.field2id_token[field])).encode())
    return digest.hexdigest()[:32]


def feature_hash(dataset: Any) -> str:
    """A hash of all that models read beside the ids: features of users and items; of sequences also those of the rows, in order."""
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
    """Feed whatever weights are made of to a digest of hashlib: tensors, numpy arrays, scipy matrices, dicts of them."""
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
    """A hash of RecBole's files of a dataset: of whatever a training or a test could read from them.

    Args:
        config: names the folder and the dataset.
    """
    files = sorted(Path(config["data_path"]).glob(f"{config['dataset']}.*"))
    return hashlib.sha256(
        json.dumps([[f.name, file_checksum(f)] for f in files if f.is_file()]).encode()
    ).hexdigest()[:32]
