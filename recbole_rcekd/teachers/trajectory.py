"""Earlier states of a teacher: kept while it is trained, and opened for a student.

They are ordinary checkpoints, beside the teacher's: ``<teacher>.trajectory/epoch-<n>.pth``, where n
is RecBole's number of the epoch, from 0.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.functional import full_precision
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.data.contexts import is_sequential
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.teachers.rescale import rescaled

# -- while a teacher is trained --------------------------------------------------------------------


class Trajectory:
    """Keeps ``n`` checkpoints of a training, spread evenly over the epochs before the best one.

    The best epoch is only known in the end. So at first every epoch is saved. Whenever more than 2n
    checkpoints are from before the best epoch so far, every second one is deleted, and the next are
    saved half as often. So there are never more than 2n + 1, besides those since the best epoch.

    Args:
        folder: where the checkpoints are written.
        n: how many are kept in the end; fewer if the best epoch was too early.

    Attributes:
        folder: where the checkpoints are written.
        n: how many are kept in the end.
        best: the number of the best epoch so far; the trainer sets it.
    """

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        self.best = 0
        self._apart = 1
        self._epochs: list[int] = []

    def add(self, epoch: int, save: Callable[[str], None]) -> None:
        """Save a checkpoint of an epoch, unless epochs like this one are skipped by now.

        Args:
            epoch: the number of the epoch that is over.
            save: a function that writes a checkpoint to a file.
        """
        if (epoch + 1) % self._apart == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(str(self._file(epoch)))
            self._epochs.append(epoch)
        while len(self._before_best()) > 2 * self.n:
            self._apart *= 2
            self._keep([each for each in self._epochs if (each + 1) % self._apart == 0])

    def finish(self, place: Path) -> list[int]:
        """Choose the ``n`` checkpoints when the training is over, and move them to a folder.

        Args:
            place: the folder.

        Returns:
            The numbers of the epochs that are kept.
        """
        self._keep(evenly(self._before_best(), self.best, self.n))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(self.folder, place)
        except OSError:
            if not place.exists():
                raise
            shutil.rmtree(self.folder)  # another command has trained the same teacher meanwhile
        return self._epochs

    def _before_best(self) -> list[int]:
        return [epoch for epoch in self._epochs if epoch < self.best]

    def _keep(self, epochs: list[int]) -> None:
        for epoch in set(self._epochs) - set(epochs):
            self._file(epoch).unlink(missing_ok=True)
        self._epochs = epochs

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}.pth"


def evenly(epochs: Sequence[int], best: int, n: int) -> list[int]:
    """Choose ``n`` of ``epochs`` that divide the time up to ``best`` into nearly equal parts.

    Args:
        epochs: numbers of epochs before ``best``, ascending.
        best: the number of the best epoch.
        n: how many to choose; all if there are fewer.
    """
    chosen: list[int] = []
    left = list(epochs)
    for part in range(1, min(n, len(epochs)) + 1):
        ideal = part * (best + 1) / (n + 1) - 1
        # One epoch is left for each of the later parts.
        possible = left[: len(left) - (min(n, len(epochs)) - part)]
        chosen.append(min(possible, key=lambda epoch: abs(epoch - ideal)))
        left = [epoch for epoch in left if epoch > chosen[-1]]
    return chosen


# -- while a student is trained --------------------------------------------------------------------


def folder_beside(teacher: str | Path) -> Path:
    """The folder of a teacher's earlier states."""
    return Path(teacher).with_suffix(".trajectory")


def state_files(loss: KDLoss, teachers: Sequence[str]) -> list[list[Path]]:
    """The checkpoints of the earlier states of each teacher, the least trained first.

    Args:
        loss: the method. Its setting ``<name>_checkpoints`` may name the files; by default they are
            beside the teachers' checkpoints.
        teachers: the files of the teachers.

    Raises:
        SettingsError: the setting names files, but there are several teachers.
        TeacherError: a teacher has no earlier states, or a file in the setting does not exist.
    """
    name = loss.prefix()
    if loss.checkpoints:
        if len(teachers) > 1:
            raise SettingsError(
                f"[{name}_checkpoints] belongs to one teacher, but there are {len(teachers)}: put "
                "the earlier checkpoints of each beside it, as "
                f"[{folder_beside(teachers[0])}{os.path.sep}epoch-<n>.pth]."
            )
        for file in loss.checkpoints:
            if not os.path.isfile(file):
                raise TeacherError(
                    f"[{name}_checkpoints] names [{file}], but there is no such file."
                )
        return [[Path(file) for file in loss.checkpoints]]
    if not teachers:
        raise TeacherError(
            f"[kd_loss] {name} learns from earlier states of the teacher: name them in "
            f"[{name}_checkpoints]."
        )
    found = []
    for teacher in teachers:
        folder = folder_beside(teacher)
        numbered = {
            int(m[1]): file
            for file in folder.glob("*.pth")
            if (m := re.fullmatch(r"epoch-(\d+)", file.stem))
        }
        if not numbered:
            raise TeacherError(
                f"[kd_loss] {name} learns from earlier states of the teacher, but [{teacher}] has "
                f"none in [{folder}{os.path.sep}epoch-<n>.pth]: have a teacher trained by its "
                "name, with --teacher_checkpoints=3 (longer, if its first epoch was its best), or "
                f"name earlier checkpoints of this one in [{name}_checkpoints]."
            )
        found.append([numbered[number] for number in sorted(numbered)])
    return found


def open_trajectories(
    teacher: Teacher,
    scores: TeacherScores,
    loss: KDLoss,
    dataset: Any,
    settings: KDSettings,
    device: torch.device,
    show_progress: bool = False,
    ranks: Ranks | None = None,
) -> list[list[TeacherScores]]:
    """The scores of the states of each teacher, the least trained first, the teacher itself last.

    Args:
        teacher: the student's teacher.
        scores: the teacher's scores, on the scale that ``settings`` says.
        loss: the method that learns from the states.
        dataset: the student's training dataset.
        settings: the keys ``kd_…``: where scores are kept, and their scale, for all states too.
        device: the device of the student.
        show_progress: show a progress bar while scores are computed.
        ranks: this process among those that need the scores.

    Raises:
        SettingsError: the loss names files, but there are several teachers.
        TeacherError: a teacher has no earlier states, or one cannot be used.
    """
    files = state_files(loss, teacher.files())
    # The rows of a sequential student come to any rank.
    owners = Ranks() if is_sequential(dataset) else ranks or Ranks()

    def open_state(state: Teacher) -> TeacherScores:
        with full_precision(device):  # the first call may be inside a training step
            opened = state.open_scores(settings, show_progress, ranks)
        return rescaled(opened, settings.kd_teacher_scores, settings.kd_teacher_temperature, device)

    def scores_of(state: Teacher) -> TeacherScores:
        if state.scores_rows:
            # Lists are made for the rows of a batch, from their scores.
            return open_state(state)
        n_contexts = int(dataset.user_num)
        return StateLists(lambda: open_state(state), n_contexts, int(dataset.item_num), owners)

    trajectories = []
    for part, paths in zip(teacher.parts, files, strict=True):
        states: list[TeacherScores] = []
        for path in paths:
            state = read_teacher(path, dataset, part.trust)
            if state.n_contexts != scores.n_contexts:
                raise TeacherError(
                    f"The teacher's earlier state in [{path}] is a {state.name}, which does not "
                    "score what the teacher scores: the states of a teacher are of one model."
                )
            state.release()
            states.append(scores_of(state))
        trajectories.append([*states, scores if part is teacher else scores_of(part)])
    return trajectories


class StateLists(TeacherScores):
    """The scores of a state of which only top-K lists are used.

    The scores are opened to make the lists, and their memory is freed afterwards.

    Args:
        open_scores: a function that opens the scores.
        n_contexts: how many users there are, padding included.
        n_items: how many items there are, padding included.
        ranks: this process among those that share the work of the top-K lists.
    """

    def __init__(
        self, open_scores: Callable[[], TeacherScores], n_contexts: int, n_items: int, ranks: Ranks
    ) -> None:
        self.n_contexts, self.n_items = n_contexts, n_items
        self._open = open_scores
        self._ranks = ranks
        self._lists: dict[bool, Tensor] = {}

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        lists = self._lists.get(unseen)
        if lists is None or lists.shape[1] < k:
            own = self._ranks.own(torch.arange(self.n_contexts, device=contexts.device))
            lists = self._lists[unseen] = self._open().top_k(own, k, unseen).int()
        return lists[self._ranks.row(contexts), :k].long()

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._open().score(contexts, items)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._open().score_all(contexts)

    def transposed(self) -> TeacherScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return self._open().transposed()
