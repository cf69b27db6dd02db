"""``run_recbole_kd``: RecBole's ``run_recbole`` with a teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from recbole_rcekd.experiment import Experiment
from recbole_rcekd.training.config import command_config


def run_recbole_kd(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
    teacher: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    kd_loss: str | list[str] | None = None,
    seeds: str | list[int] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Train a student with distillation, from data to test result.

    With several processes, each calls this function. Its ``config_dict`` must have the keys that
    RecBole's ``run`` sets (``local_rank``, ``nproc``, ``world_size``, ``ip``, ``port``,
    ``offset``); the command and :func:`~recbole_rcekd.core.distributed.run_ranks` set them. All
    processes return the same result; the first writes the files and the log.

    Args:
        model: the student, a RecBole model name; a config file may name it instead.
        dataset: the RecBole dataset name; a config file may name it instead.
        config_file_list: RecBole property files, which may contain KD keys.
        config_dict: RecBole parameters and KD keys.
        saved: keep checkpoints.
        teacher: a RecBole checkpoint, a file of scores, several of these (a list, or separated by
            commas), or the name of a model. A model is trained first, or found if it was trained
            before.
        kd_loss: the methods to train with, in order: names from ``LOSSES``, and ``scratch`` for no
            distillation.
        seeds: the seeds to repeat each method with, on the same split and teacher (``[0, 1, 2]`` or
            ``"0,1,2"``); default: the Config's seed.
        output_dir: where ``result.json`` and a ``history.csv`` for each run are written; finished
            runs that are found there are not repeated.

    Returns:
        RecBole's keys (``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``,
        ``test_result``) of the last method's first run, and ``teacher``, ``runs``, ``summary`` as
        in ``result.json``.

    Raises:
        SettingsError: a setting is unknown or wrong; most are checked before data are read.
        TeacherError: the teacher cannot be used for this student.
    """
    given = {"teacher": teacher, "kd_loss": kd_loss, "seeds": seeds, "output_dir": output_dir}
    joined_before = dist.is_initialized()
    config = command_config(model, dataset, config_file_list, config_dict, given)
    result = Experiment(config, saved).run()
    if dist.is_initialized() and not joined_before:
        dist.barrier()  # the first process holds the connections of all
        dist.destroy_process_group()
    return result
