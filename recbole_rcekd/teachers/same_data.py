"""Checks that a teacher learned from the same interactions as its student will.

A teacher is refused unless its *training interactions* are the student's. In RecBole the split
depends on the seed, so a teacher with another seed has most likely seen the student's test
interactions, and the student would learn them from it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import recbole.data.dataset
import torch
from recbole.utils import InputType, ModelType, init_seed
from recbole.utils.argument_list import dataset_arguments
from torch import Tensor

from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.types import Seen
from recbole_rcekd.data.contexts import ids_of_tokens, is_sequential
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.data.sequence_dataset import create_dataset

# The keys that the training interactions depend on, besides RecBole's dataset arguments.
_SPLIT_KEYS = ("seed", "repeatable")


# The keys that reading features depends on, besides RecBole's dataset arguments.
_FEATURE_KEYS = (
    *("numerical_features", "discretization", "kg_reverse_r"),
    *("entity_kg_num_interval", "relation_kg_num_interval"),
)


def teachers_data(config: Any, student_dataset: Any) -> Any:
    """The training dataset of a teacher.

    If the settings of teacher and student are equal, this is the student's dataset. If not, the
    teacher's data are read and split again.

    Args:
        config: the teacher's Config. The student's folders of checkpoints and data are written into
            it.
        student_dataset: the student's training dataset.
    """
    student_config = student_dataset.config
    config["checkpoint_dir"] = student_config["checkpoint_dir"]
    # The same settings with other files give another split. If the teacher's files do not exist any
    # more, they have been moved, and the student's are the same files.
    elsewhere = _are_other_files(config["data_path"], student_config["data_path"])
    if not elsewhere:
        config["data_path"] = student_config["data_path"]
    if not elsewhere and _same_split_by_settings(config, student_config):
        return student_dataset
    return _rebuilt(config)


def _same_split_by_settings(teacher: Any, student: Any) -> bool:
    """Whether the settings of data and split are equal, so that the interactions are too."""
    if _draws_negatives(student) and not _draws_negatives(teacher):
        # The student's loader has more columns, which a feature-based teacher would read too.
        return False
    keys = [*dataset_arguments, *_FEATURE_KEYS]
    ready_split = teacher["benchmark_filename"] is not None
    if not ready_split:
        keys += _SPLIT_KEYS
        parts = ("split", "group_by", "order")
        if any(teacher["eval_args"].get(p) != student["eval_args"].get(p) for p in parts):
            return False
    return _dataset_class(teacher) == _dataset_class(student) and all(
        teacher[key] == student[key] for key in keys
    )


def _are_other_files(own: str, students: str) -> bool:
    return os.path.isdir(own) and os.path.isdir(students) and not os.path.samefile(own, students)


def _draws_negatives(config: Any) -> bool:
    """Whether the loader adds the columns of a negative item to each row."""
    return bool(config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE)


def _dataset_class(config: Any) -> tuple[str, ...]:
    """The values by which RecBole chooses the Dataset class.

    The ids and rows of the classes for knowledge-aware and sequential models differ from others.
    """
    own = f"{config['model']}Dataset"
    own = own if hasattr(recbole.data.dataset, own) else ""
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        return "sequential", own, config["kd_sequence_split"] or "rows"
    return ("knowledge" if config["MODEL_TYPE"] == ModelType.KNOWLEDGE else "general", own)


def _rebuilt(config: Any) -> Any:
    """The teacher's own training dataset, split exactly as in its own run."""
    with preserved_random_state():
        init_seed(config["seed"], config["reproducibility"])
        built = create_dataset(config).build()
    return built[0]


def require_same_interactions(
    dataset: Any, student_dataset: Any, user_ids: Tensor, item_ids: Tensor, source: Any
) -> None:
    """Refuse a teacher that learned from other interactions than the student will.

    Args:
        dataset: the teacher's training dataset.
        student_dataset: the student's training dataset.
        user_ids: the teacher's id of each of the student's users (:func:`ids_in`).
        item_ids: the teacher's id of each of the student's items (:func:`ids_in`).
        source: the teacher's file, for messages.

    Raises:
        TeacherError: the interactions differ. The message says how many are the same, and what to
            do.
    """
    own, wanted = training_interactions(dataset), training_interactions(student_dataset)
    back_to_student = torch.zeros(int(dataset.user_num), dtype=torch.int64)
    back_to_student[user_ids] = torch.arange(len(user_ids))
    items_to_student = torch.zeros(int(dataset.item_num), dtype=torch.int64)
    items_to_student[item_ids] = torch.arange(len(item_ids))
    users = torch.repeat_interleave(torch.arange(int(dataset.user_num)), own.counts())
    translated = Seen.from_pairs(
        back_to_student[users],
        items_to_student[own.ids],
        int(student_dataset.user_num),
        int(student_dataset.item_num),
    )
    if torch.equal(translated.starts, wanted.starts) and torch.equal(translated.ids, wanted.ids):
        return
    hint = (
        "Train it with the same seed, split and filters (seed, eval_args, load_col, "
        "…_inter_num_interval, val_interval)"
    )
    if is_sequential(dataset) != is_sequential(student_dataset):
        hint = (
            "RecBole splits the rows of sequential models, and the interactions of others: set "
            "kd_sequence_split: interactions for the sequential one of the two, with the same "
            "eval_args (order: TO)"
        )
    common = np.intersect1d(_keys(translated), _keys(wanted), assume_unique=True).size
    raise TeacherError(
        f"The teacher in [{source}] learned from other interactions than this student will: "
        f"{common} of the student's {len(wanted.ids)} training interactions are among the "
        f"teacher's {len(translated.ids)}, so the teacher may have seen the student's test set. "
        f"{hint}, or distil with the teacher's."
    )


def _keys(seen: Seen) -> np.ndarray[Any, Any]:
    owners = torch.repeat_interleave(torch.arange(len(seen.starts) - 1), seen.counts())
    return (owners * seen.n_ids + seen.ids).numpy()


def ids_in(student_dataset: Any, teacher_dataset: Any, field: str, source: str) -> Tensor:
    """For each of the student's ids the teacher's id of the same token.

    Args:
        student_dataset: the student's dataset.
        teacher_dataset: the teacher's dataset.
        field: the id field of users or of items.
        source: the teacher's file, for messages.

    Raises:
        TeacherError: the teacher's data lack some of the student's tokens.
    """
    tokens = student_dataset.field2id_token[field]
    ids = teacher_dataset.field2token_id[field]
    missing = [str(token) for token in tokens if token not in ids]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise TeacherError(
            f"The teacher in [{source}] does not know {len(missing)} of the student's "
            f"{len(tokens) - 1} values of [{field}]: {shown}. Use the same filters for both."
        )
    return ids_of_tokens(tokens, ids)
