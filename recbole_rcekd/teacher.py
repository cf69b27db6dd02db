"""The teacher: a RecBole checkpoint rebuilt from its own Config, frozen, its ids translated to the student's.

A teacher is refused unless its *training interactions* are the student's. In RecBole the random seed is part of the
split, so a teacher of another seed has most likely seen the student's test set, and its knowledge would leak.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import recbole.data.dataset
import scipy.sparse
import torch
from recbole.utils import InputType, ModelType, get_model, init_seed
from recbole.utils.argument_list import dataset_arguments
from torch import Tensor

from recbole_rcekd.checkpoint import read_checkpoint
from recbole_rcekd.contexts import (
    ROW_FIELD,
    Contexts,
    Rows,
    TranslatedRows,
    Users,
    WholeSequences,
    ids_of_tokens,
    is_sequential,
)
from recbole_rcekd.errors import TeacherError
from recbole_rcekd.processes import MACHINE_KEYS
from recbole_rcekd.scoring import EVALUATION_CACHES, ModelScorer, preserved_random_state, require_rankable
from recbole_rcekd.sequences import create_dataset, training_pairs
from recbole_rcekd.types import Seen

_SEQUENCES_AT_A_TIME = 1024
# What decides the training interactions, besides RecBole's dataset arguments.
_SPLIT_KEYS = ("seed", "repeatable")
# What decides how features are read, and is none of RecBole's dataset arguments.
_FEATURE_KEYS = (
    *("numerical_features", "discretization", "kg_reverse_r"),
    *("entity_kg_num_interval", "relation_kg_num_interval"),
)
# A Config may name other files to be unpickled; the weights come from the checkpoint alone.
_NEUTRAL = {
    "dataset_save_path": None,
    "dataloaders_save_path": None,
    "save_dataset": False,
    "save_dataloaders": False,
    "use_pretrain": False,  # NeuMF
}
# Likewise, while the model is built.
_NEUTRAL_FOR: dict[str, dict[str, Any]] = {
    "ConvNCF": {"train_method": "no_pretrain"},
    "KD_DAGFM": {"phase": "teacher_training"},
    "NAIS": {"pretrain_path": None},
    "RaCT": {"train_stage": "actor_pretrain"},
    "S3Rec": {"train_stage": "pretrain"},
}
# Of several processes, other draws made the weights, which have a hash of their own.
_UNIMPORTANT = MACHINE_KEYS | {"local_rank", "world_size"}


class Teacher:
    """A frozen model that is asked in the student's ids.

    Made by :func:`read_teacher`.

    Args:
        checkpoint: what :func:`~recbole_rcekd.checkpoint.read_checkpoint` returned.
        dataset: the teacher's training dataset.
        student_dataset: the student's training dataset.
        device: where to score.
        source: the file, for messages, and to read the weights again after :meth:`release`.
        trust: how to read it.

    Attributes:
        n_contexts: how many contexts it scores: users, or, for a sequential student, rows of the training data.
        student_dataset: as given.
        for_rows: the student is sequential.
        scores_rows: so is the teacher; it scores the student's rows. Otherwise it scores users: a sequential one each with
            the whole training sequence.
        taken: the training interactions of each user.
        trust: as given.
        seen: what lists of unseen items leave out, for each context.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        dataset: Any,
        student_dataset: Any,
        device: torch.device,
        source: str,
        trust: bool = False,
    ) -> None:
        self.config = checkpoint["config"]
        self.source = source
        self.name = str(self.config["model"])
        self.device = device
        self.n_items = int(student_dataset.item_num)
        self.taken = training_interactions(student_dataset)
        self._checkpoint: dict[str, Any] | None = checkpoint
        self.trust = trust
        self._dataset = dataset
        self.student_dataset = student_dataset
        same = dataset is student_dataset
        self.user_ids = None if same else _translate(student_dataset, dataset, student_dataset.uid_field, source)
        self.item_ids = None if same else _translate(student_dataset, dataset, student_dataset.iid_field, source)
        self.for_rows = is_sequential(student_dataset)
        self.scores_rows = is_sequential(dataset) and is_sequential(student_dataset)
        self.contexts = self._contexts()
        self.n_contexts = self.contexts.n
        self.seen = Seen.nothing(self.n_contexts, self.n_items) if self.scores_rows else self.taken

    @property
    def scores_users(self) -> bool:
        """Whether it has a vector for each user, and not for each sequence."""
        return isinstance(self.contexts, Users)

    def _contexts(self) -> Contexts:
        if not is_sequential(self._dataset):
            return Users(self._dataset, self.user_ids, self.config)
        if not is_sequential(self.student_dataset):
            return WholeSequences(self._dataset, self.user_ids)
        if self._dataset is self.student_dataset:
            return Rows(self._dataset, self.config)
        return TranslatedRows(self.student_dataset, self._dataset)

    @cached_property
    def model(self) -> Any:
        """The RecBole model in evaluation mode, without gradients; built on first use, so not at all on a cache hit."""
        self.config["device"] = self.device
        # Building it draws random numbers, which must not shift the student's; and those that a checkpoint does not hold
        # (weights of FwFM) must be drawn as they were in training, which RecBole seeds so, too.
        with preserved_random_state():
            init_seed(self.config["seed"], self.config["reproducibility"])
            model = self._build()
        try:
            model.load_state_dict(self._content()["state_dict"])
        except RuntimeError as error:
            raise TeacherError(
                f"The weights in [{self.source}] do not fit a {self.config['model']} on this dataset: it was trained "
                f"on other data or filters. {str(error).splitlines()[-1].strip()}"
            ) from error
        model.load_other_parameter(self._content().get("other_parameter"))
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model

    def _build(self) -> Any:
        neutral = _NEUTRAL_FOR.get(self.name, {})
        own = {key: self.config[key] for key in neutral}
        try:
            for key, value in neutral.items():
                self.config[key] = value
            model = get_model(self.name)(self.config, self._dataset).to(self.device)
        finally:
            for key, value in own.items():
                self.config[key] = value
        for key in own.keys() & vars(model).keys():
            setattr(model, key, own[key])  # KD_DAGFM's phase says which of its two networks scores
        return model

    @cached_property
    def scorer(self) -> ModelScorer:
        """How the model is scored."""
        return ModelScorer(self.model, self._dataset, contexts=self.contexts, frozen=True)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the scores: weights, settings, id maps, training interactions."""
        digest = hashlib.sha256()
        settings = self.config.final_config_dict
        for key in sorted(settings):
            if key not in _UNIMPORTANT:
                digest.update(f"{key}={settings[key]!r};".encode())
        other = self._content().get("other_parameter") or {}
        learned = {name: value for name, value in other.items() if name not in EVALUATION_CACHES}
        _hash_value(digest, self._content()["state_dict"])
        _hash_value(digest, learned)
        digest.update(split_hash(self.student_dataset).encode())
        digest.update(feature_hash(self._dataset).encode())
        if self.scores_rows:
            digest.update(feature_hash(self.student_dataset).encode())
        for ids in (self.user_ids, self.item_ids):
            digest.update(b"same" if ids is None else ids.numpy().tobytes())
        return digest.hexdigest()[:32]

    def release(self) -> None:
        """Give the memory of weights and model back; the file is read again if they are needed after all."""
        self._checkpoint = None
        for cached in ("model", "scorer"):
            vars(self).pop(cached, None)

    def _content(self) -> dict[str, Any]:
        if self._checkpoint is None:
            self._checkpoint = read_checkpoint(self.source, self.trust)
        return self._checkpoint

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The two tables ``[n_contexts, d]``, ``[n_items, d]`` in the student's ids; ``None`` if scores are no product."""
        if self.scorer.kind != "product":
            return None
        # Sequences go through the model some at a time; a graph model propagates once for all users.
        size = _SEQUENCES_AT_A_TIME if is_sequential(self._dataset) else self.n_contexts
        with preserved_random_state(), self.scorer.evaluating():
            parts = [
                self.scorer.operands(block.to(self.device))
                for block in torch.split(torch.arange(self.n_contexts), size)
            ]
        rows, table = torch.cat([part[0].float() for part in parts]), parts[0][1].float()
        return rows, table.clone() if self.item_ids is None else table[self.item_ids.to(self.device)]

    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` of every item in the student's ids, −inf at the padding item."""
        if not self.scores_rows:
            contexts = contexts.clamp(min=1)  # RippleNet has no place for the padding user, whose scores mean nothing
        # MacridVAE and ADMMSLIM, for example, draw noise in evaluation too.
        with preserved_random_state(), self.scorer.evaluating():
            return self._in_student_ids(self.scorer.score_all(contexts))

    def score_rows(self, rows: Any) -> Tensor:
        """Scores ``[n, n_items]`` of every item for rows of the student's data (training or not), as ``score_all``.

        A teacher that scores users is asked for the rows' users.
        """
        if not isinstance(self.contexts, (Rows, TranslatedRows)):
            return self.score_all(rows[self.student_dataset.uid_field])
        rows = self.contexts.translated(rows)
        with preserved_random_state(), self.scorer.evaluating():
            return self._in_student_ids(self.scorer.score_batch(rows, []).score_all())

    def _in_student_ids(self, scores: Tensor) -> Tensor:
        return scores.float() if self.item_ids is None else scores.float()[:, self.item_ids.to(scores.device)]

    def user_tokens(self, contexts: Tensor) -> list[str]:
        """The names of users in the user's data, for messages."""
        users = contexts
        if self.scores_rows:
            users = self.student_dataset.inter_feat[self.student_dataset.uid_field][contexts]
        tokens = self.student_dataset.field2id_token[self.student_dataset.uid_field]
        return [str(tokens[int(i)]) for i in users]


def read_teacher(checkpoint: str | Path, train_data: Any, trust: bool = False) -> Teacher:
    """Open a RecBole checkpoint as the teacher of a student.

    Args:
        checkpoint: path of a checkpoint that RecBole's trainer wrote; its own Config is used, never the command line.
        train_data: the student's training data, as ``data_preparation`` returned it (or its dataset).
        trust: allow pickled content beyond RecBole's own (see :mod:`recbole_rcekd.checkpoint`).

    Returns:
        The teacher: frozen, in evaluation mode, answering in the student's ids.

    Raises:
        TeacherError: the file is not usable, or the teacher learned from other interactions than the student will.

    Example:
        >>> teacher = read_teacher("saved/BPR-Nov-24-2026_11-29-00.pth", train_data)  # doctest: +SKIP
    """
    student_dataset = getattr(train_data, "_dataset", train_data)
    student_config = student_dataset.config
    content = read_checkpoint(checkpoint, trust)
    config = own_config(content, checkpoint)
    if config["dataset"] != student_config["dataset"]:
        raise TeacherError(
            f"The teacher in [{checkpoint}] was trained on [{config['dataset']}], the student's dataset is "
            f"[{student_config['dataset']}]. Train a teacher on the student's dataset."
        )
    config["checkpoint_dir"] = student_config["checkpoint_dir"]
    # Equal settings of other files are another split; files that are gone must have been moved here.
    elsewhere = _are_other_files(config["data_path"], student_config["data_path"])
    if not elsewhere:
        config["data_path"] = student_config["data_path"]
    if not elsewhere and _same_split_by_settings(config, student_config):
        dataset = student_dataset
    else:
        dataset = _rebuild_training_data(config)
    teacher = Teacher(content, dataset, student_dataset, torch.device(student_config["device"]), str(checkpoint), trust)
    if dataset is not student_dataset:
        _require_same_interactions(teacher, dataset, student_dataset, checkpoint)
    getLogger().info(f"Teacher: {config['model']} from [{checkpoint}]")
    return teacher


def own_config(content: dict[str, Any], source: Any) -> Any:
    """The Config in a checkpoint, such that it names no other files and no other processes.

    Args:
        content: what :func:`~recbole_rcekd.checkpoint.read_checkpoint` returned.
        source: the file, for messages.

    Raises:
        TeacherError: it is no Config, or of a model that this RecBole does not know.
        ScoringError: of one that is trained outside of torch.
    """
    config = content["config"]
    if not hasattr(config, "final_config_dict") or not config["model"]:
        raise TeacherError(f"[{source}] is not a RecBole checkpoint: its [config] is no RecBole Config.")
    for key, value in {**_NEUTRAL, "single_spec": True, "local_rank": 0}.items():
        config[key] = value
    try:
        model_class = get_model(config["model"])
        require_rankable(model_class)
    except (ValueError, ImportError) as error:  # it looks among models that need lightgbm, too
        raise TeacherError(f"[{source}] holds a [{config['model']}], which this RecBole does not know.") from error
    # KD_DAGFM evaluates this setting as Python.
    if config["model"] == "KD_DAGFM" and not hasattr(sys.modules[model_class.__module__], str(config["teacher"])):
        raise TeacherError(f"[{source}] names a network [teacher] {config['teacher']!r}, which KD_DAGFM does not have.")
    return config


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
        columns = {} if table is None else {name: table[name] for name in table if name != ROW_FIELD}
        _hash_value(digest, columns)
    return digest.hexdigest()[:32]


def _hash_value(digest: Any, value: Any) -> None:
    """Feed whatever weights are made of to the digest: tensors, numpy arrays, scipy matrices, dicts of them."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}=".encode())
            _hash_value(digest, value[key])
    elif isinstance(value, Tensor):
        _hash_value(digest, value.detach().cpu().numpy())
    elif scipy.sparse.issparse(value):
        coordinates = value.tocoo()
        for part in (coordinates.row, coordinates.col, coordinates.data):
            _hash_value(digest, part)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(f"{value!r};".encode())


def _same_split_by_settings(teacher: Any, student: Any) -> bool:
    """Equal settings of data and split give equal interactions; then nothing has to be read again."""
    if _draws_negatives(student) and not _draws_negatives(teacher):
        return False  # the student's loader names more columns, which a model of features would take for its own
    keys = [*dataset_arguments, *_FEATURE_KEYS]
    ready_split = teacher["benchmark_filename"] is not None
    if not ready_split:
        keys += _SPLIT_KEYS
        parts = ("split", "group_by", "order")
        if any(teacher["eval_args"].get(p) != student["eval_args"].get(p) for p in parts):
            return False
    return _dataset_class(teacher) == _dataset_class(student) and all(teacher[key] == student[key] for key in keys)


def _are_other_files(own: str, students: str) -> bool:
    return os.path.isdir(own) and os.path.isdir(students) and not os.path.samefile(own, students)


def _draws_negatives(config: Any) -> bool:
    """Whether each row is loaded with the columns of a negative beside it."""
    return bool(config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE)


def _dataset_class(config: Any) -> tuple[str, ...]:
    """What RecBole chooses the Dataset class by: the id maps and rows of knowledge-aware and sequential ones differ."""
    own = f"{config['model']}Dataset"
    own = own if hasattr(recbole.data.dataset, own) else ""
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        return "sequential", own, config["kd_sequence_split"] or "rows"
    return ("knowledge" if config["MODEL_TYPE"] == ModelType.KNOWLEDGE else "general", own)


def _rebuild_training_data(config: Any) -> Any:
    """The teacher's own training interactions, split exactly as in its own run."""
    with preserved_random_state():
        init_seed(config["seed"], config["reproducibility"])
        built = create_dataset(config).build()
    return built[0]


def _require_same_interactions(teacher: Teacher, dataset: Any, student_dataset: Any, source: Any) -> None:
    own, wanted = training_interactions(dataset), teacher.taken
    user_ids, item_ids = teacher.user_ids, teacher.item_ids
    if user_ids is None or item_ids is None:
        raise TeacherError("a teacher with its own dataset has its own ids")
    back_to_student = torch.zeros(int(dataset.user_num), dtype=torch.int64)
    back_to_student[user_ids] = torch.arange(len(user_ids))
    items_to_student = torch.zeros(int(dataset.item_num), dtype=torch.int64)
    items_to_student[item_ids] = torch.arange(len(item_ids))
    users = torch.repeat_interleave(torch.arange(int(dataset.user_num)), own.counts())
    n_users = int(student_dataset.user_num)
    translated = Seen.from_pairs(back_to_student[users], items_to_student[own.ids], n_users, teacher.n_items)
    if torch.equal(translated.starts, wanted.starts) and torch.equal(translated.ids, wanted.ids):
        return
    hint = (
        "Train it with the same seed, split and filters (seed, eval_args, load_col, …_inter_num_interval, val_interval)"
    )
    if is_sequential(dataset) != is_sequential(student_dataset):
        hint = (
            "RecBole splits the rows of sequential models, and the interactions of others: set kd_sequence_split: interactions "
            "for the sequential one of the two, with the same eval_args (order: TO)"
        )
    common = np.intersect1d(_keys(translated), _keys(wanted), assume_unique=True).size
    raise TeacherError(
        f"The teacher in [{source}] learned from other interactions than this student will: {common} of the student's "
        f"{len(wanted.ids)} training interactions are among the teacher's {len(translated.ids)}, so the teacher may "
        f"have seen the student's test set. {hint}, or distil with the teacher's."
    )


def _keys(seen: Seen) -> np.ndarray[Any, Any]:
    owners = torch.repeat_interleave(torch.arange(len(seen.starts) - 1), seen.counts())
    return (owners * seen.n_ids + seen.ids).numpy()


def _translate(student_dataset: Any, teacher_dataset: Any, field: str, source: str) -> Tensor:
    """For each student id the teacher's id of the same token."""
    tokens = student_dataset.field2id_token[field]
    ids = teacher_dataset.field2token_id[field]
    missing = [str(token) for token in tokens if token not in ids]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise TeacherError(
            f"The teacher in [{source}] does not know {len(missing)} of the student's {len(tokens) - 1} values of "
            f"[{field}]: {shown}. Use the same filters for both."
        )
    return ids_of_tokens(tokens, ids)
