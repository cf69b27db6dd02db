"""The results of a command: a record of each run, ``result.json``, and the table that is shown."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy
import recbole
import scipy
import torch
from scipy.stats import ttest_rel
from tabulate import tabulate

from recbole_rcekd.core.distributed import MACHINE_KEYS
from recbole_rcekd.core.files import write_json, write_whole
from recbole_rcekd.data.sequences import training_pairs
from recbole_rcekd.evaluation.comparison import transfer_ratio
from recbole_rcekd.losses.methods import SCRATCH, prefix_of
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.trajectory import state_files
from recbole_rcekd.training.run_settings import Run

RESULT_FORMAT = 1
# Keys that do not change the result of a run. (`world_size` does, because the draws differ.)
_UNIMPORTANT = frozenset(
    {
        *MACHINE_KEYS,
        "eval_batch_size",
        "show_progress",
        "state",
        "output_dir",
        "seeds",
        "log_wandb",
        "kd_cache_dir",
        *("tune", "trials", "params_file", "algo"),
        "teacher_checkpoints",
    }
)


@dataclass(frozen=True)
class RunResult:
    """The result of one training run of a student: an entry of ``runs`` in ``result.json``.

    docs/result.md describes the fields.
    """

    loss: str
    seed: int
    settings: dict[str, Any]
    best_valid_score: float
    best_valid_result: dict[str, float]
    test_result: dict[str, float]
    epochs: int
    seconds: float
    seconds_per_epoch: float
    parameters: int
    checkpoint: str
    checkpoint_bytes: int
    ranking_ms_per_1000_users: float
    fingerprint: str
    assistant: dict[str, Any] | None = None


@dataclass(frozen=True)
class TeacherResult:
    """The results of the teacher (or an assistant): ``teacher`` in ``result.json``.

    ``epochs``, ``seconds`` and ``seconds_per_epoch`` are 0 for a teacher that the command did not
    train. For several teachers, parameters, bytes and times are added up. For a file of scores,
    parameters and the time to rank are 0.
    """

    model: str
    checkpoint: str
    fingerprint: str
    best_valid_result: dict[str, float]
    test_result: dict[str, float]
    parameters: int
    checkpoint_bytes: int
    ranking_ms_per_1000_users: float
    epochs: int = 0
    seconds: float = 0.0
    seconds_per_epoch: float = 0.0


@dataclass
class Report:
    """The results of one command: written to disk after each run, and shown in a table.

    Args:
        config: the command's Config.
        folder: the key ``output_dir``; ``None``: nothing is written.
        split: a hash of the training interactions.
        dataset: the training dataset.
        data: a hash of the data files, which also contain features, validation and test data.
        teacher: the results of the teacher, if there is one.
        runs: the results of the finished runs.
    """

    config: Any
    folder: Path | None
    split: str
    dataset: Any
    data: str = ""
    teacher: TeacherResult | None = None
    runs: list[RunResult] = field(default_factory=list)

    def add(self, run: RunResult) -> None:
        """Add a run and write the files, ``run.json`` in the run's folder first."""
        self.runs.append(run)
        folder = self.run_folder(run.loss, run.seed)
        if folder is not None and self.folder is not None:
            write_json(folder / "run.json", asdict(run))
            write_json(self.folder / "result.json", self.as_dict())
            write_whole(self.folder / "summary.md", self.table("github") + "\n")

    def make_room(self, loss: str, seed: int) -> None:
        """Rename the folder of a run, if an earlier command has finished another run in it.

        Args:
            loss: the method of the run that is about to start.
            seed: the seed of that run.
        """
        folder = self.run_folder(loss, seed)
        if folder is None or not (folder / "run.json").exists():
            return
        aside, number = folder.with_name(f"{folder.name}.1"), 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}.{number}")
        folder.rename(aside)
        getLogger().warning(
            f"[{folder}] holds a run with other settings, data or teacher: it is kept as [{aside}]."
        )

    def run_folder(self, loss: str, seed: int) -> Path | None:
        """The folder of one run, ``<loss>-seed<seed>``."""
        return None if self.folder is None else self.folder / f"{loss.replace(':', '.')}-seed{seed}"

    def fingerprint(self, run: Run, teacher: Teacher | None) -> str:
        """A hash of everything that a run's result depends on, except its seed.

        Args:
            run: the run.
            teacher: the teacher of the command, if there is one.
        """
        own = run.method.prefixes
        foreign: tuple[str, ...] = ("kd_",) if run.method.alone else ()
        if not run.method.needs_teacher:
            teacher, foreign = None, (*foreign, "teacher")
        settings = {
            k: repr(v)
            for k, v in sorted(run.config.final_config_dict.items())
            if k not in _UNIMPORTANT
            and not k.startswith(foreign)
            and prefix_of(k, own) in (None, *own)
        }
        for loss_type in run.method.losses.values():
            # A run from before these keys were removed is the same run.
            settings |= {key: repr(value) for key, value in loss_type.settings_type.retired.items()}
        parts: list[Any] = [
            run.name,
            dict(sorted(settings.items())),
            self.split,
            self.data,
            teacher.fingerprint if teacher else "",
        ]
        if teacher is not None:
            # The states are from the training of one teacher, so the numbers of their epochs
            # identify them.
            for loss in run.losses_of_earlier_states():
                files = state_files(loss, teacher.files())
                parts.append([[file.name for file in states] for states in files])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def finished(self, run: Run, seed: int, teacher: Teacher | None) -> RunResult | None:
        """The result of the same run, if an earlier command has finished it in this folder.

        Args:
            run: the run.
            seed: the seed of the run.
            teacher: the teacher of the command, if there is one.
        """
        folder = self.run_folder(run.name, seed)
        if folder is None or not (folder / "run.json").exists():
            return None
        try:
            # Files from before there were assistants do not have this field.
            known = {
                "assistant": None,
                **json.loads((folder / "run.json").read_text(encoding="utf-8")),
            }
            found = RunResult(**{f.name: known[f.name] for f in fields(RunResult)})
        except (ValueError, KeyError, TypeError):
            return None
        if found.fingerprint != self.fingerprint(run, teacher):
            return None
        return found if not found.checkpoint or os.path.exists(found.checkpoint) else None

    def as_dict(self) -> dict[str, Any]:
        """The content of ``result.json``; docs/result.md describes each key."""
        return {
            "format": RESULT_FORMAT,
            "command": shlex.join(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            "dataset": {
                "name": self.config["dataset"],
                "users": int(self.dataset.user_num) - 1,
                "items": int(self.dataset.item_num) - 1,
                "training_interactions": len(training_pairs(self.dataset)[0]),
                "split": self.split,
            },
            "student": self.config["model"],
            "metric": self.metric,
            "teacher": asdict(self.teacher) if self.teacher else None,
            "runs": [asdict(run) for run in self.runs],
            "summary": self.summary(),
        }

    @property
    def metric(self) -> str:
        """RecBole's ``valid_metric``, which the transfer ratio and the t-test use."""
        return str(self.config["valid_metric"]).lower()

    def summary(self) -> list[dict[str, Any]]:
        """For each method: mean and deviation over the seeds, transfer ratio, paired t-test."""
        by_loss = {
            loss: [r for r in self.runs if r.loss == loss]
            for loss in dict.fromkeys(r.loss for r in self.runs)
        }
        means = {
            loss: _mean(r.test_result[self.metric] for r in runs) for loss, runs in by_loss.items()
        }
        rows = []
        for loss, runs in by_loss.items():
            others = {other: mean for other, mean in means.items() if other != loss}
            better = max if self.config["valid_metric_bigger"] else min
            best_other = better(others, key=lambda k: others[k]) if others else None
            rows.append(
                {
                    "loss": loss,
                    "seeds": [r.seed for r in runs],
                    "test": {k: _mean(r.test_result[k] for r in runs) for k in runs[0].test_result},
                    "std": {k: _std([r.test_result[k] for r in runs]) for k in runs[0].test_result},
                    "transfer_ratio": self._transfer_ratio(loss, means),
                    "best_other": best_other,
                    "p_value": self._p_value(by_loss, loss, best_other),
                    "epochs": _mean(r.epochs for r in runs),
                    "seconds_per_epoch": _mean(r.seconds_per_epoch for r in runs),
                    "seconds": _mean(r.seconds for r in runs),
                    "parameters": runs[0].parameters,
                    "checkpoint_bytes": runs[0].checkpoint_bytes,
                    "ranking_ms_per_1000_users": _mean(r.ranking_ms_per_1000_users for r in runs),
                }
            )
        return rows

    def _transfer_ratio(self, loss: str, means: dict[str, float]) -> float | None:
        if self.teacher is None or SCRATCH not in means or loss == SCRATCH:
            return None
        bigger = bool(self.config["valid_metric_bigger"])
        return transfer_ratio(
            means[loss], means[SCRATCH], self.teacher.test_result[self.metric], bigger
        )

    def _p_value(
        self, by_loss: dict[str, list[RunResult]], loss: str, other: str | None
    ) -> float | None:
        """The p-value of a two-sided paired t-test against another method, over common seeds."""
        if other is None:
            return None
        mine, theirs = (
            {r.seed: r.test_result[self.metric] for r in by_loss[name]} for name in (loss, other)
        )
        common = sorted(mine.keys() & theirs.keys())
        differences = {mine[s] - theirs[s] for s in common}
        if len(common) < 2 or len(differences) < 2:
            return None
        return float(ttest_rel([mine[s] for s in common], [theirs[s] for s in common]).pvalue)

    def table(self, style: str = "simple_outline") -> str:
        """Teacher and methods side by side, on the test set."""
        summary = self.summary()
        if not summary:
            return ""
        metrics = list(summary[0]["test"])
        several = len(summary[0]["seeds"]) > 1
        header = [
            "",
            *metrics,
            "transfer",
            *(["p"] if several else []),
            "parameters",
            "checkpoint",
            "rank 1000 users",
        ]
        header += ["epochs", "s/epoch"]
        rows: list[list[Any]] = []
        if self.teacher:
            t = self.teacher
            rows.append(
                [
                    f"teacher {t.model}",
                    *(f"{t.test_result[m]:.4f}" for m in metrics),
                    "",
                    *([""] if several else []),
                ]
                + _costs(t.parameters, t.checkpoint_bytes, t.ranking_ms_per_1000_users)
                + ([f"{t.epochs}", f"{t.seconds_per_epoch:.2f}"] if t.epochs else ["–", "–"])
            )
        for row in summary:
            name = "student alone" if row["loss"] == SCRATCH else f"student, {row['loss']}"
            cells = [
                f"{row['test'][m]:.4f}" + (f" ± {row['std'][m]:.4f}" if several else "")
                for m in metrics
            ]
            ratio, p = row["transfer_ratio"], row["p_value"]
            rows.append(
                [name, *cells, "" if ratio is None else f"{ratio:.0%}"]
                + ([("" if p is None else f"{p:.3f}")] if several else [])
                + _costs(
                    row["parameters"], row["checkpoint_bytes"], row["ranking_ms_per_1000_users"]
                )
                + [f"{row['epochs']:.0f}", f"{row['seconds_per_epoch']:.2f}"]
            )
        return str(
            tabulate(
                rows,
                header,
                tablefmt=style,
                disable_numparse=True,
                colalign=["left"] + ["right"] * (len(header) - 1),
            )
        )

    def show(self) -> None:
        """Log the table."""
        seeds = len({run.seed for run in self.runs})
        note = (
            f"{self.config['dataset']}, {self.config['model']}, test results, "
            f"{seeds} seed{'s' * (seeds > 1)}; "
        )
        note += f"transfer = (distilled − alone) / (teacher − alone) in {self.metric}"
        if seeds > 1:
            note += (
                "; ± standard deviation over seeds; p: paired t-test against the best other method"
            )
        getLogger().info(f"{note}\n{self.table()}")

    def result(self, bigger: bool) -> dict[str, Any]:
        """The value that ``run_recbole_kd`` returns: RecBole's keys, and more.

        Args:
            bigger: a bigger value of ``valid_metric`` is better.
        """
        last = next(run for run in self.runs if run.loss == self.runs[-1].loss)
        return {
            "best_valid_score": last.best_valid_score,
            "valid_score_bigger": bigger,
            "best_valid_result": last.best_valid_result,
            "test_result": last.test_result,
            "teacher": asdict(self.teacher) if self.teacher else None,
            "runs": [asdict(run) for run in self.runs],
            "summary": self.summary(),
        }


def _costs(parameters: int, size: int, milliseconds: float) -> list[str]:
    return [f"{parameters:,}", f"{size / 2**20:.2f} MiB", f"{milliseconds:.1f} ms"]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "recbole": recbole.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
