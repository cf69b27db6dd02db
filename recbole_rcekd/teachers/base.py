"""The teacher, as one protocol: what every kind of teacher can be asked."""

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
    """Who teaches a student: frozen, and asked in the student's ids (0 is padding).

    A kind of teacher is a subclass. :meth:`score_all` and :attr:`fingerprint` are what it must
    say; all else has an answer that fits a teacher who scores users. One that ``--teacher`` can
    name also has :meth:`recognises` and :meth:`load`, and a line in
    :data:`~recbole_rcekd.teachers.load.TEACHERS`.

    Args:
        student_dataset: the student's training dataset.
        name: for tables and messages.
        source: what named it: a file, as a rule; several with commas between.

    Attributes:
        device: where scores are wanted: the student's.
        n_items: size of the student's catalogue, padding included.
        for_rows: the student is sequential: it learns rows, a sequence and its next item each.
        scores_rows: this teacher scores such rows, and not users.
        scores_users: its factors have a vector for each user.
        config: RecBole's Config of the model behind it; ``None``: there is no such model.
        trust: its files may hold more than RecBole puts there.
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

    # -- how ``--teacher`` finds it ----------------------------------------------------------------

    @classmethod
    def recognises(cls, source: str) -> bool:
        """Whether a name that was given to ``--teacher`` is one of this kind, by the name alone."""
        return False

    @classmethod
    def is_there(cls, source: str) -> bool:
        """Whether what the name stands for exists: a file, unless the kind says otherwise."""
        return os.path.exists(source)

    @classmethod
    def load(
        cls, source: str, student_dataset: Any, settings: TeacherSettings, trust: bool
    ) -> Teacher:
        """Open what the name stands for.

        Args:
            source: a name that :meth:`recognises` accepted.
            student_dataset: the student's training dataset.
            settings: the keys ``teacher_…`` of the command.
            trust: ``teacher_trust``.

        Raises:
            TeacherError: it cannot teach this student.
        """
        raise TeacherError(f"A {cls.__name__} cannot be opened by a name, here {source!r}.")

    # -- what it must say --------------------------------------------------------------------------

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that decides the scores; scores kept on disk are found again by it."""

    @abstractmethod
    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` of every item for users ``[n]`` (rows if ``scores_rows``).

        float32, a higher score is better; the padding item's column is −inf.
        """

    # -- whom it speaks of -------------------------------------------------------------------------

    @property
    def n_contexts(self) -> int:
        """How many users it scores, padding included; of ``scores_rows`` how many rows."""
        return len(self.student_dataset) if self.scores_rows else int(self.student_dataset.user_num)

    @cached_property
    def taken(self) -> Seen:
        """The training interactions of each user."""
        return training_interactions(self.student_dataset)

    @cached_property
    def seen(self) -> Seen:
        """What lists of unseen items leave out, for each user; of rows nothing."""
        return Seen.nothing(self.n_contexts, self.n_items) if self.scores_rows else self.taken

    def user_tokens(self, contexts: Tensor) -> list[str]:
        """The names of users in the student's data, for messages; of rows those of their users."""
        data = self.student_dataset
        users = data.inter_feat[data.uid_field][contexts] if self.scores_rows else contexts
        return [str(data.field2id_token[data.uid_field][int(i)]) for i in users]

    def require_data(self, dataset: Any) -> None:
        """Refuse a training on other data than those that the teacher was loaded with.

        Its lists of unseen items leave these out.

        Raises:
            TeacherError: the training interactions differ.
        """
        own = self.student_dataset
        if own is not dataset and split_hash(own) != split_hash(dataset):
            raise TeacherError(
                "[teacher] was loaded with other data than those of this training, so it may know "
                "the test set: give load_teacher the train_data that fit gets."
            )

    # -- what it says ------------------------------------------------------------------------------

    def score_rows(self, rows: Any) -> Tensor:
        """Scores ``[n, n_items]`` for rows of the student's data, of training or not.

        A teacher that scores users is asked for the rows' users.
        """
        return self.score_all(rows[self.student_dataset.uid_field])

    def listed_rows(self, rows: Any) -> Tensor:
        """As :meth:`score_rows`, with −inf at items that the teacher does not list."""
        return self.score_rows(rows)

    def scores_and_listed(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`score_all`, and the same with −inf at items that the teacher does not list."""
        scores = self.score_all(contexts)
        return scores, scores

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Tables ``[n_contexts, d]`` and ``[n_items, d]`` whose product the scores are, if any."""
        return None

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """All its scores, ready to be asked while a student trains; computed once, kept on disk.

        Args:
            settings: ``kd_cache_dir`` and ``kd_cache_dtype``.
            show_progress: a progress bar while scores are computed.
            ranks: this process among those that need the scores.

        Raises:
            TeacherError: scores are NaN or infinite; the message names users.
            KDError: they do not fit on the disk.
        """
        return open_teacher_scores(self, settings, show_progress, ranks)

    def release(self) -> None:  # noqa: B027  (most have nothing to give)
        """Give back memory that only computing scores needs."""

    # -- what it is made of ------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Teacher]:
        """The teachers that it consists of: itself, unless it is several."""
        return [self]

    def files(self) -> list[str]:
        """The files that hold it."""
        return [part.source for part in self.parts if part.source]

    def scorers(self) -> list[ModelScorer]:
        """The models behind it, whose parameters and time count as its cost."""
        return []
