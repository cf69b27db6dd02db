"""The interface of all teachers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.data.contexts import is_sequential
from recbole_rcekd.data.fingerprint import split_hash, training_interactions
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.score_cache import open_teacher_scores


class Teacher(ABC):
    """The teacher of a student: frozen, and used with the student's ids (0 is padding).

    Each kind of teacher is a subclass. It must have :meth:`score_all` and :attr:`fingerprint`; all
    other members have defaults for a teacher that scores users. A kind that ``--teacher`` can name
    also has :meth:`recognises` and :meth:`load`, and a line in
    :data:`~recbole_rcekd.teachers.load.TEACHERS`.

    Args:
        student_dataset: the student's training dataset.
        name: the teacher's name in tables and messages.
        source: where the teacher comes from: usually a file, or several, separated by commas.

    Attributes:
        student_dataset: the student's training dataset.
        name: the teacher's name in tables and messages.
        source: where the teacher comes from.
        device: the device of the scores, which is the student's.
        n_items: how many items the student has, padding included.
        for_rows: the student is sequential. It learns rows: a sequence and its next item each.
        scores_rows: the teacher scores such rows, not users.
        scores_users: the teacher's factors (:meth:`factors`) have an embedding for each user.
        config: the RecBole Config of the teacher's model; ``None`` if there is no such model.
        trust: the teacher's files may contain pickled objects that are not RecBole's.
    """

    scores_rows: bool = False
    scores_users: bool = True
    config: Any = None
    trust: bool = False

    def __init__(self, student_dataset: Any, name: str, source: str = "") -> None:
        self.student_dataset = student_dataset
        self.name, self.source = name, source
        self.device = torch.device(student_dataset.config["device"])
        self.n_items = int(student_dataset.item_num)
        self.for_rows = is_sequential(student_dataset)

    # -- opened by ``--teacher`` -------------------------------------------------------------------

    @classmethod
    def recognises(cls, source: str) -> bool:
        """Whether ``source``, a value of ``--teacher``, names a teacher of this kind.

        Only the name is looked at, not the file.
        """
        return False

    @classmethod
    def is_there(cls, source: str) -> bool:
        """Whether the teacher that ``source`` names exists; by default, whether the file does."""
        return os.path.exists(source)

    @classmethod
    def load(
        cls, source: str, student_dataset: Any, settings: TeacherSettings, trust: bool
    ) -> Teacher:
        """Open the teacher that ``source`` names.

        Args:
            source: a name that :meth:`recognises` accepted.
            student_dataset: the student's training dataset.
            settings: the keys ``teacher_…`` of the command.
            trust: the key ``teacher_trust``.

        Raises:
            TeacherError: the teacher cannot teach this student.
        """
        raise TeacherError(f"A {cls.__name__} cannot be opened by a name, here {source!r}.")

    # -- required of every kind --------------------------------------------------------------------

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that the scores depend on; it names the scores kept on disk."""

    @abstractmethod
    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` of all items for users ``[n]`` (rows if ``scores_rows``).

        float32; a higher score is better. The column of the padding item is −inf.
        """

    # -- the users (or rows) -----------------------------------------------------------------------

    @property
    def n_contexts(self) -> int:
        """How many users the teacher scores, padding included; how many rows if ``scores_rows``."""
        return len(self.student_dataset) if self.scores_rows else int(self.student_dataset.user_num)

    @cached_property
    def taken(self) -> Seen:
        """The training interactions of each user."""
        return training_interactions(self.student_dataset)

    @cached_property
    def seen(self) -> Seen:
        """The items that top-K lists of unseen items leave out, for each user; none for rows."""
        return Seen.nothing(self.n_contexts, self.n_items) if self.scores_rows else self.taken

    def user_tokens(self, contexts: Tensor) -> list[str]:
        """The tokens of users in the student's data, for messages; of rows those of their users."""
        data = self.student_dataset
        users = data.inter_feat[data.uid_field][contexts] if self.scores_rows else contexts
        return [str(data.field2id_token[data.uid_field][int(i)]) for i in users]

    def require_data(self, dataset: Any) -> None:
        """Refuse training data other than those that the teacher was loaded with.

        The teacher's top-K lists of unseen items leave out the training interactions.

        Args:
            dataset: the dataset of the training.

        Raises:
            TeacherError: the training interactions differ.
        """
        own = self.student_dataset
        if own is not dataset and split_hash(own) != split_hash(dataset):
            raise TeacherError(
                "[teacher] was loaded with other data than those of this training, so it may know "
                "the test set: give load_teacher the train_data that fit gets."
            )

    # -- scores ------------------------------------------------------------------------------------

    def score_rows(self, rows: Any) -> Tensor:
        """Scores ``[n, n_items]`` for rows of the student's data (training, validation or test).

        A teacher that scores users gives the scores of the rows' users.
        """
        return self.score_all(rows[self.student_dataset.uid_field])

    def listed_rows(self, rows: Any) -> Tensor:
        """The result of :meth:`score_rows`, with −inf at items that the teacher does not list."""
        return self.score_rows(rows)

    def scores_and_listed(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The result of :meth:`score_all`, and the same with −inf at items that are not listed."""
        scores = self.score_all(contexts)
        return scores, scores

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Tables ``[n_contexts, d]`` and ``[n_items, d]`` whose product is the scores, if any."""
        return None

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """The teacher's scores for the training of a student; computed once and kept on disk.

        Args:
            settings: ``kd_cache_dir`` and ``kd_cache_dtype`` are used.
            show_progress: show a progress bar while scores are computed.
            ranks: this process among those that need the scores.

        Raises:
            TeacherError: scores are NaN or infinite; the message names users.
            KDError: the scores do not fit on the disk.
        """
        return open_teacher_scores(self, settings, show_progress, ranks)

    def release(self) -> None:  # noqa: B027  (optional)
        """Free the memory that is only needed to compute scores."""

    # -- parts, files and models -------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Teacher]:
        """The teachers that this one consists of: itself, unless it is an ensemble."""
        return [self]

    def files(self) -> list[str]:
        """The files of the teacher."""
        return [part.source for part in self.parts if part.source]

    def scorers(self) -> list[ModelScorer]:
        """The teacher's models; reports count their parameters and the time to rank with them."""
        return []
