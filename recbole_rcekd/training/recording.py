"""RecBole's trainers with unique file names, complete checkpoints and a history."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from recbole.trainer import Trainer
from recbole.utils import get_local_time, get_trainer, set_color

from recbole_rcekd.compat import without_anomaly_detection
from recbole_rcekd.compat.instances import config_for_one, replaced
from recbole_rcekd.compat.loading import fast_batches
from recbole_rcekd.core.distributed import Ranks, note_checkpoint
from recbole_rcekd.core.files import replacing
from recbole_rcekd.teachers.trajectory import Trajectory
from recbole_rcekd.training.history import History


class RecordingMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Adds unique file names, complete checkpoints and a history to a RecBole trainer.

    RecBole names a checkpoint by the second, so two runs that start together overwrite each other's
    checkpoints; and a run that is stopped while it saves leaves an incomplete file. Here names are
    unique, and a checkpoint replaces the last one when it is complete. With several processes, the
    first names the checkpoint and writes it, and the others wait for it.

    Args:
        config: the model's Config.
        model: the model.

    Attributes:
        run_label: a part of the names of the files.
        history: one row per epoch; ``history.file`` is beside the checkpoint unless changed.
        trajectory: keeps earlier checkpoints, if set.
        ranks: this process among those that train the model.
    """

    run_label = "scratch"
    config: Any
    optimizer: Any

    def __init__(self, config: Any, model: Any) -> None:
        # RecBole fails here if two runs make the folder at the same time.
        os.makedirs(config["checkpoint_dir"], exist_ok=True)
        super().__init__(config, model)
        self.ranks = Ranks.of(config)
        name = f"{config['model']}-{self.run_label}-{get_local_time()}-{uuid.uuid4().hex[:6]}"
        name = self.ranks.broadcast(name)
        self.saved_model_file = str(Path(self.checkpoint_dir) / f"{name}.pth")
        self.history = History(
            Path(self.checkpoint_dir) / f"{name}.history.csv" if self.ranks.first else None
        )
        self.trajectory: Trajectory | None = None

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        if not self.ranks.first:
            return
        elsewhere = kwargs.pop("saved_model_file", None)
        wanted = elsewhere or self.saved_model_file
        with replacing(wanted) as beside, replaced(self, "config", config_for_one(self.config)):
            super()._save_checkpoint(epoch, verbose=False, saved_model_file=str(beside), **kwargs)
            written = beside.exists()
        if not written:
            return
        if elsewhere is None:
            note_checkpoint(wanted)
            if self.trajectory is not None:
                self.trajectory.best = epoch
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {wanted}")

    def _begin_epoch(self, epoch_idx: int, n_steps: int) -> None:
        """Called before the first batch of an epoch; its time counts as training time."""

    def _end_epoch(self, epoch_idx: int, n_steps: int) -> dict[str, float]:
        """Called after the last batch of an epoch; its time counts as training time.

        Returns:
            Numbers for the history.
        """
        return {}

    def _train_epoch(self, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.history.begin(epoch_idx)
        started, n_steps = perf_counter(), len(train_data)
        self._begin_epoch(epoch_idx, n_steps)
        with fast_batches(train_data), without_anomaly_detection():
            losses = super()._train_epoch(train_data, epoch_idx, *args, **kwargs)
        found = self._end_epoch(epoch_idx, n_steps)
        total = float(sum(losses) if isinstance(losses, tuple) else losses)
        loss = self.ranks.mean({"train_loss": total / max(1, n_steps)})
        self.history.note(train_seconds=perf_counter() - started, **loss, **found)
        if self.trajectory is not None:
            self.trajectory.add(
                epoch_idx,
                lambda file: self._save_checkpoint(epoch_idx, False, saved_model_file=file),
            )
        return losses

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        started = perf_counter()
        score, result = super()._valid_epoch(valid_data, show_progress=show_progress)
        self.history.note(
            valid_seconds=perf_counter() - started,
            **{f"valid_{k}": float(v) for k, v in result.items()},
        )
        return score, result

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As RecBole's ``evaluate``, but it waits until the checkpoint to load has been written."""
        if load_best_model:
            self.ranks.barrier()
        return super().evaluate(eval_data, load_best_model, *args, **kwargs)


def recording_trainer(config: Any) -> type[RecordingMixin]:
    """RecBole's own trainer of ``config["model"]``, with what :class:`RecordingMixin` adds."""
    own = get_trainer(config["MODEL_TYPE"], config["model"])
    return type(f"Recording{own.__name__}", (RecordingMixin, own), {})
