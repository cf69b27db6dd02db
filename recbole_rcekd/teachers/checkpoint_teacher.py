"""A teacher from a RecBole checkpoint, rebuilt from the Config in it, with the student's ids."""

from __future__ import annotations

import hashlib
import sys
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.utils import get_model, init_seed
from torch import Tensor

from recbole_rcekd.compat.habits import EVALUATION_CACHES, OTHER_FILES, OTHER_FILES_OF
from recbole_rcekd.core.distributed import MACHINE_KEYS
from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.settings import TeacherSettings
from recbole_rcekd.data.contexts import (
    Contexts,
    Rows,
    TranslatedRows,
    Users,
    WholeSequences,
    is_sequential,
)
from recbole_rcekd.data.fingerprint import (
    feature_hash,
    hash_value,
    split_hash,
)
from recbole_rcekd.models.probe import require_rankable
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.safe_load import read_checkpoint
from recbole_rcekd.teachers.same_data import ids_in, require_same_interactions, teachers_data

_SEQUENCES_AT_A_TIME = 1024
# Keys that do not change the scores. (The number of processes changes the random draws of the
# training, and so the weights, which are hashed themselves.)
_UNIMPORTANT = MACHINE_KEYS | {"local_rank", "world_size"}


class CheckpointTeacher(Teacher):
    """A teacher from a RecBole checkpoint; :func:`read_teacher` opens one.

    If teacher and student are both sequential, it scores the student's rows. Otherwise it scores
    users; a sequential teacher scores each user's whole training sequence.

    Args:
        checkpoint: what :func:`~recbole_rcekd.teachers.safe_load.read_checkpoint` returned.
        dataset: the teacher's training dataset.
        student_dataset: the student's training dataset.
        device: the device to score on.
        source: the file of the checkpoint. Messages name it, and after :meth:`release` it is read
            again.
        trust: allow pickled objects in the file that are not RecBole's.

    Attributes:
        contexts: the inputs of the teacher's model: users, or rows of sequences.
        user_ids: for each of the student's users the id in the teacher's data; ``None``: the same.
        item_ids: for each of the student's items the id in the teacher's data; ``None``: the same.
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
        super().__init__(student_dataset, str(checkpoint["config"]["model"]), source)
        self.config = checkpoint["config"]
        self.device = torch.device(device)
        self.trust = trust
        self._checkpoint: dict[str, Any] | None = checkpoint
        self._dataset = dataset
        self.user_ids = self.item_ids = None
        if dataset is not student_dataset:
            self.user_ids = ids_in(student_dataset, dataset, student_dataset.uid_field, source)
            self.item_ids = ids_in(student_dataset, dataset, student_dataset.iid_field, source)
        self.scores_rows = is_sequential(dataset) and is_sequential(student_dataset)
        self.contexts = self._contexts()
        self.scores_users = isinstance(self.contexts, Users)

    @classmethod
    def recognises(cls, source: str) -> bool:
        """Accept every name: a name that no other kind recognises is one of a checkpoint."""
        return True

    @classmethod
    def load(
        cls, source: str, student_dataset: Any, settings: TeacherSettings, trust: bool
    ) -> CheckpointTeacher:
        """See :func:`read_teacher`."""
        return read_teacher(source, student_dataset, trust)

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
        """The RecBole model, in evaluation mode and without gradients.

        It is built on first use. If its scores are on disk, it is not built at all.
        """
        self.config["device"] = self.device
        # Building a model draws random numbers, which must not shift the student's. The seed is the
        # one that RecBole trained with, because a checkpoint does not hold all weights that are
        # drawn (those of FwFM, for example).
        with preserved_random_state():
            init_seed(self.config["seed"], self.config["reproducibility"])
            model = self._build()
        try:
            model.load_state_dict(self._content()["state_dict"])
        except RuntimeError as error:
            raise TeacherError(
                f"The weights in [{self.source}] do not fit a {self.config['model']} on this "
                "dataset: it was trained on other data or filters. "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error
        model.load_other_parameter(self._content().get("other_parameter"))
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model

    def _build(self) -> Any:
        neutral = OTHER_FILES_OF.get(self.name, {})
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
        """A hash of everything that the scores depend on.

        These are weights, settings, the translation of ids, features and training interactions.
        """
        digest = hashlib.sha256()
        settings = self.config.final_config_dict
        for key in sorted(settings):
            if key not in _UNIMPORTANT:
                digest.update(f"{key}={settings[key]!r};".encode())
        other = self._content().get("other_parameter") or {}
        learned = {name: value for name, value in other.items() if name not in EVALUATION_CACHES}
        hash_value(digest, self._content()["state_dict"])
        hash_value(digest, learned)
        digest.update(split_hash(self.student_dataset).encode())
        digest.update(feature_hash(self._dataset).encode())
        if self.scores_rows:
            digest.update(feature_hash(self.student_dataset).encode())
        for ids in (self.user_ids, self.item_ids):
            digest.update(b"same" if ids is None else ids.numpy().tobytes())
        return digest.hexdigest()[:32]

    def release(self) -> None:
        """Free the memory of weights and model.

        If they are needed again, the file is read again.
        """
        self._checkpoint = None
        for cached in ("model", "scorer"):
            vars(self).pop(cached, None)

    def _content(self) -> dict[str, Any]:
        if self._checkpoint is None:
            self._checkpoint = read_checkpoint(self.source, self.trust)
        return self._checkpoint

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`; in the order of the student's ids."""
        if self.scorer.kind != "product":
            return None
        # Sequences go through the model in blocks; for users one call is better, since a graph
        # model propagates in each call.
        size = _SEQUENCES_AT_A_TIME if is_sequential(self._dataset) else self.n_contexts
        with preserved_random_state(), self.scorer.evaluating():
            parts = [
                self.scorer.operands(block.to(self.device))
                for block in torch.split(torch.arange(self.n_contexts), size)
            ]
        rows, table = torch.cat([part[0].float() for part in parts]), parts[0][1].float()
        return rows, (
            table.clone() if self.item_ids is None else table[self.item_ids.to(self.device)]
        )

    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` of all items in the student's ids; −inf at the padding item."""
        if not self.scores_rows:
            # RippleNet has no row for the padding user. The scores of that user mean nothing, so
            # those of another user are as good.
            contexts = contexts.clamp(min=1)
        # MacridVAE and ADMMSLIM, for example, draw noise in evaluation too.
        with preserved_random_state(), self.scorer.evaluating():
            return self._in_student_ids(self.scorer.score_all(contexts))

    def score_rows(self, rows: Any) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        if not isinstance(self.contexts, (Rows, TranslatedRows)):
            return self.score_all(rows[self.student_dataset.uid_field])
        rows = self.contexts.translated(rows)
        with preserved_random_state(), self.scorer.evaluating():
            return self._in_student_ids(self.scorer.score_batch(rows, []).score_all())

    def _in_student_ids(self, scores: Tensor) -> Tensor:
        return (
            scores.float()
            if self.item_ids is None
            else scores.float()[:, self.item_ids.to(scores.device)]
        )

    def scorers(self) -> list[ModelScorer]:
        """The scorer of the teacher's model."""
        return [self.scorer]


def read_teacher(checkpoint: str | Path, train_data: Any, trust: bool = False) -> CheckpointTeacher:
    """Open a RecBole checkpoint as the teacher of a student.

    Args:
        checkpoint: path of a checkpoint that RecBole's trainer wrote. The Config in it is used, not
            the command line.
        train_data: the student's training data, as ``data_preparation`` returned it (or its
            dataset).
        trust: allow pickled objects that are not RecBole's (see
            :mod:`recbole_rcekd.teachers.safe_load`).

    Returns:
        The teacher: frozen, in evaluation mode, with the student's ids.

    Raises:
        TeacherError: the file is not usable, or the teacher learned from other interactions than
            the student will.

    Example:
        >>> file = "saved/BPR-Nov-24-2026_11-29-00.pth"
        >>> teacher = read_teacher(file, train_data)  # doctest: +SKIP
    """
    student_dataset = getattr(train_data, "_dataset", train_data)
    student_config = student_dataset.config
    content = read_checkpoint(checkpoint, trust)
    config = own_config(content, checkpoint)
    if config["dataset"] != student_config["dataset"]:
        raise TeacherError(
            f"The teacher in [{checkpoint}] was trained on [{config['dataset']}], the student's "
            f"dataset is [{student_config['dataset']}]. Train a teacher on the student's dataset."
        )
    dataset = teachers_data(config, student_dataset)
    teacher = CheckpointTeacher(
        content,
        dataset,
        student_dataset,
        torch.device(student_config["device"]),
        str(checkpoint),
        trust,
    )
    if teacher.user_ids is not None and teacher.item_ids is not None:
        require_same_interactions(
            dataset, student_dataset, teacher.user_ids, teacher.item_ids, checkpoint
        )
    getLogger().info(f"Teacher: {config['model']} from [{checkpoint}]")
    return teacher


def own_config(content: dict[str, Any], source: Any) -> Any:
    """The Config in a checkpoint, changed so that it names no other files and no other processes.

    Args:
        content: what :func:`~recbole_rcekd.teachers.safe_load.read_checkpoint` returned.
        source: the file, for messages.

    Raises:
        TeacherError: there is no Config, or its model is not one of the installed RecBole.
        ScoringError: the model is not trained with torch.
    """
    config = content["config"]
    if not hasattr(config, "final_config_dict") or not config["model"]:
        raise TeacherError(
            f"[{source}] is not a RecBole checkpoint: its [config] is no RecBole Config."
        )
    for key, value in {**OTHER_FILES, "single_spec": True, "local_rank": 0}.items():
        config[key] = value
    try:
        model_class = get_model(config["model"])
        require_rankable(model_class)
    except (ValueError, ImportError) as error:  # get_model may import lightgbm
        raise TeacherError(
            f"[{source}] holds a [{config['model']}], which this RecBole does not know."
        ) from error
    # KD_DAGFM evaluates the setting [teacher] as Python.
    if config["model"] == "KD_DAGFM" and not hasattr(
        sys.modules[model_class.__module__], str(config["teacher"])
    ):
        raise TeacherError(
            f"[{source}] names a network [teacher] {config['teacher']!r}, which KD_DAGFM does not "
            "have."
        )
    return config
