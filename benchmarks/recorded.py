"""The tables of results/methods.md from what the runs wrote: one folder per method with result.json and tuning.json.

python benchmarks/recorded.py results/methods/gowalla
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import stdev
from typing import Any

from tabulate import tabulate

CALLED = {
    "scratch": "student alone",
    "scratch-plain": "student alone, weight decay as all",
    "softmax": "student alone, `softmax`",
    "rce-kdonly": "`rce`, KD only",
    "rce-auto": "`rce`, T: auto",
}
METRICS = ("ndcg@10", "ndcg@20", "recall@10", "recall@20")


def main() -> None:
    """Parse, read, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    methods = sorted(path.name for path in folder.iterdir() if path.is_dir())
    print(
        table(
            test_rows(folder, methods),
            ["", "searched", *map(named, METRICS), "transfer", "epochs", "epoch", "memory"],
        )
    )
    print(table(search_rows(folder, methods), ["", "best", "each trial"], 3))


def table(rows: list[list[str]], header: list[str], texts: int = 2) -> str:
    """Markdown; all but the first columns are numbers."""
    align = ["left"] * texts + ["right"] * (len(header) - texts)
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align) + "\n"


def named(metric: str) -> str:
    """As papers write it."""
    name, k = metric.split("@")
    return f"{'NDCG' if name == 'ndcg' else name.capitalize()}@{k}"


def called(method: str) -> str:
    """What a row is called."""
    return CALLED.get(method, f"`{method}`")


def test_rows(folder: Path, methods: list[str]) -> list[list[str]]:
    """Best first, below the teacher: mean and deviation over the seeds, and the share of the teacher's advantage."""
    results = {name: read(folder / name / "result.json") for name in methods}
    found = {name: result for name, result in results.items() if result}
    if not found:
        return []
    scores = {
        name: {metric: [run["test_result"][metric] for run in result["runs"]] for metric in METRICS}
        for name, result in found.items()
    }
    mean = {name: sum(own["ndcg@10"]) / len(own["ndcg@10"]) for name, own in scores.items()}
    teacher = next(
        result["teacher"]["test_result"] for result in found.values() if result["teacher"]
    )
    costs = read(folder.parent / "cost.json")
    rows = [["teacher", "", *(short(teacher[metric]) for metric in METRICS), "", "", "", ""]]
    for name in sorted(mean, key=lambda name: -mean[name]):
        values = [spread(scores[name][metric]) for metric in METRICS]
        share = ""
        if "scratch" in mean and name != "scratch":
            share = f"{(mean[name] - mean['scratch']) / (teacher['ndcg@10'] - mean['scratch']):.0%}"
        epochs = max(run["epochs"] for run in found[name]["runs"])
        cost = [f"{factor:.2f}×" for factor in costs.get(name.split("-")[0], [])] or ["", ""]
        rows.append([called(name), chosen(folder / name), *values, share, str(epochs), *cost])
    return rows


def chosen(folder: Path) -> str:
    """What the search took."""
    tuning = read(folder / "tuning.json")
    if not tuning:
        return ""
    ((losses, search),) = tuning.items()
    names = []
    for key, value in search["best"].items():
        (short_key,) = {key.removeprefix(f"{loss}_") for loss in losses.split("+")} - {key} or {key}
        names.append(f"{short_key.replace('_', ' ')} {value:g}")
    return ", ".join(names)


def search_rows(folder: Path, methods: list[str]) -> list[list[str]]:
    """Best first: all trials, by what was tried."""
    rows = []
    for name in methods:
        tuning = read(folder / name / "tuning.json")
        if tuning:
            (search,) = tuning.values()
            trials = sorted(search["trials"], key=lambda trial: list(trial["tried"].values()))
            tried = [
                f"{', '.join(f'{value:g}' for value in trial['tried'].values())}: "
                f"{short(trial['best_valid_score'])}"
                for trial in trials
            ]
            rows.append(
                (
                    search["best_valid_score"],
                    [called(name), short(search["best_valid_score"]), ", ".join(tried)],
                )
            )
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def spread(values: list[float]) -> str:
    """Mean and deviation; of one value no deviation."""
    mean = short(sum(values) / len(values))
    return f"{mean} ± {short(stdev(values))}" if len(values) > 1 else mean


def short(value: float) -> str:
    """Four decimals without the zero before them."""
    return f"{value:.4f}".replace("0.", ".", 1)


def read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing if it is not there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


if __name__ == "__main__":
    main()
