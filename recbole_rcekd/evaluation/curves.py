"""The histories of several runs side by side: tables, a file, and (with matplotlib) a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_rcekd.core.errors import SettingsError

History = list[dict[str, float]]
# Title, header, rows.
Table = tuple[str, list[str], list[list[str]]]

_NOTES = {
    "ndcg": "NDCG@10 of the student's list with the teacher's as truth",
    "over": "share of the teacher's list in the student's",
    "clos": "Δ of the candidates in nats; 0 is closed",
    "vali": "RecBole's validation",
}
# Colours that colour-blind people can tell apart (Okabe and Ito); dashes help too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":")


def read_histories(sources: Sequence[str]) -> dict[str, History]:
    """Read histories, by the names of their runs (``rce-seed0``).

    Args:
        sources: files, or folders such as an ``output_dir``, whose subfolders are searched too.

    Raises:
        SettingsError: a source has no history, or a file is no history.
    """
    files = [file for source in sources for file in _files_of(Path(source))]
    files = list({file.resolve(): file for file in files}.values())
    for depth in (1, 2, 3):
        names = [_name(file, depth) for file in files]
        if len(set(names)) == len(names):
            break
    else:
        names = [str(file) for file in files]
    return {name: _read(file) for name, file in zip(names, files, strict=True)}


def _files_of(source: Path) -> list[Path]:
    found = (
        sorted([*source.rglob("history.csv"), *source.rglob("*.history.csv")])
        if source.is_dir()
        else [source]
    )
    if not found or not found[0].is_file():
        raise SettingsError(
            f"[history] {source} is no history: give the output_dir of a command, or a history.csv "
            "of one run."
        )
    return found


def _name(file: Path, depth: int) -> str:
    """The name of a run: the last ``depth`` parts of its path.

    With depth 1, ``out/rce-seed0/history.csv`` is ``rce-seed0``, and
    ``saved/BPR-rce-….history.csv`` is ``BPR-rce-…``.
    """
    own = file.name.removesuffix(".csv").removesuffix(".history")
    parts = [*file.resolve().parts[:-1], *([] if own == "history" else [own])]
    return "/".join(parts[-depth:])


def _read(file: Path) -> History:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = [
                {k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(stream)
            ]
    except (ValueError, TypeError) as error:  # the file is no text, or a value no number
        raise SettingsError(f"[history] {file} is no history: {error}.") from error
    if not rows or any("epoch" not in row for row in rows):
        raise SettingsError(
            f"[history] {file} is no history: it has no rows, or no column [epoch]."
        )
    return rows


def quantities(histories: Mapping[str, History], metric: str | None = None) -> list[str]:
    """The columns that are compared: those of figure 5 in the paper, if some run has them.

    Args:
        histories: the histories, by run.
        metric: the metric whose validation is shown; default: NDCG@10, or the first one.

    Raises:
        SettingsError: no run has any of the columns.
    """
    columns = list(
        dict.fromkeys(name for rows in histories.values() for row in rows for name in row)
    )
    valid = [name for name in columns if name.startswith("valid_") and name != "valid_seconds"]
    wanted = [
        name for name in (f"valid_{(metric or '').lower()}", "valid_ndcg@10") if name in valid
    ]
    of_teacher = [name for name in columns if name.endswith("_to_teacher")]
    overlaps = [name for name in columns if name.startswith("overlap@")]
    gaps = [name for name in columns if name == "closure_gap"]
    found = [*of_teacher, *overlaps, *gaps, *[*wanted, *valid][:1]]
    if not found:
        raise SettingsError(
            "[history] has nothing to compare: runs without validation and without distillation "
            "have no such numbers."
        )
    return found


def tables(histories: Mapping[str, History], columns: Sequence[str]) -> list[Table]:
    """A table for each column: runs side by side at the epochs 0, 1, 2, 5, 10, … and the last one.

    A number is the last one known at that epoch (not every epoch is validated). "–" means that
    there is none yet, or that the run has ended. A run without numbers in a column is left out of
    its table.

    Args:
        histories: the histories, by run.
        columns: the columns that are shown.
    """
    last = {name: int(rows[-1]["epoch"]) for name, rows in histories.items()}
    found: list[Table] = []
    for column in columns:
        runs = {
            name: rows for name, rows in histories.items() if any(column in row for row in rows)
        }
        epochs = [epoch for epoch in _epochs() if epoch < max(last[name] for name in runs)]
        body = [
            [str(epoch), *(_cell(rows, column, epoch, last[name]) for name, rows in runs.items())]
            for epoch in epochs
        ]
        body.append(
            ["last", *(_cell(rows, column, last[name], last[name]) for name, rows in runs.items())]
        )
        title = f"{column} by epoch: {_NOTES[column[:4]]}"
        found.append((title, ["epoch", *(f"{name} (to {last[name]})" for name in runs)], body))
    return found


def _epochs() -> list[int]:
    return [0, *(digit * 10**power for power in range(7) for digit in (1, 2, 5))]


def _cell(rows: History, column: str, epoch: int, last: int) -> str:
    known = [row[column] for row in rows if row["epoch"] <= epoch and column in row]
    return format(known[-1], ".4f") if known and epoch <= last else "–"


def write_curves(file: Path, histories: Mapping[str, History], columns: Sequence[str]) -> None:
    """Write all epochs of all runs to one CSV file; a value that a run does not have is empty.

    Args:
        file: the file.
        histories: the histories, by run.
        columns: the columns after run and epoch.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(
            stream, ["run", "epoch", *columns], restval="", extrasaction="ignore"
        )
        writer.writeheader()
        for name, rows in histories.items():
            writer.writerows({"run": name, **row, "epoch": int(row["epoch"])} for row in rows)


def draw_curves(file: Path, histories: Mapping[str, History], columns: Sequence[str]) -> bool:
    """Draw a picture with a panel for each column.

    Args:
        file: the file of the picture.
        histories: the histories, by run.
        columns: the columns that are drawn.

    Returns:
        ``False`` if matplotlib is not installed, and so no file was written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    n_columns = min(2, len(columns))
    n_rows = -(-len(columns) // n_columns)
    figure: Any = Figure(figsize=(4.6 * n_columns, 3.1 * n_rows + 0.5), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    lines: dict[str, Any] = {}
    for panel, column in zip(panels, columns, strict=False):
        for i, (name, rows) in enumerate(histories.items()):
            known = [(row["epoch"], row[column]) for row in rows if column in row]
            if known:
                style = {
                    "color": _COLOURS[i % len(_COLOURS)],
                    "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)],
                }
                (lines[name],) = panel.plot(*zip(*known, strict=True), linewidth=1.4, **style)
        panel.set_title(column, fontsize=10)
        panel.set_xlabel("epoch", fontsize=9)
        panel.grid(color="#e0e0e0", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    names = [name for name in histories if name in lines]
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return True
