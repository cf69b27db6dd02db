"""The tables of results/methods.md, from a folder with one folder for each method.

    python benchmarks/recorded.py results/methods/gowalla

The folder of a method has the files result.json and tuning.json that its runs wrote.
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
    """Read the folders and print the tables."""
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
    """A table in Markdown; the first ``texts`` columns are texts, the others numbers."""
    align = ["left"] * texts + ["right"] * (len(header) - texts)
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align) + "\n"


def named(metric: str) -> str:
    """The name of a metric as in papers."""
    name, k = metric.split("@")
    return f"{'NDCG' if name == 'ndcg' else name.capitalize()}@{k}"


def called(method: str) -> str:
    """The name of a method in the table."""
    return CALLED.get(method, f"`{method}`")


def test_rows(folder: Path, methods: list[str]) -> list[list[str]]:
    """Test results, the teacher first and then the methods, best first.

    They are means and deviations over the seeds, and the share of the teacher's advantage over the
    student alone.
    """
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
    """The settings that the search chose."""
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
    """All trials of each method, best method first."""
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
    """Mean and deviation; without a deviation for one value."""
    mean = short(sum(values) / len(values))
    return f"{mean} ± {short(stdev(values))}" if len(values) > 1 else mean


def short(value: float) -> str:
    """Four decimals without the zero before them."""
    return f"{value:.4f}".replace("0.", ".", 1)


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


if __name__ == "__main__":
    main()
