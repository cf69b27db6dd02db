"""The full matrix: every model as teacher and as student, and the table of the results.

    python -m tests.conformance.matrix --out docs/model_support.md

Each model is run in a process of its own, so that a crash does not stop the others. The outcomes
are kept in ``--work``, so the same command goes on where it was stopped. Outcomes of other sources
or versions are found again. ``--only`` names models or packages.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.conformance import checks
from tests.conformance.facts import find_facts
from tests.conformance.models import Model, registry
from tests.conformance.world import write_world

# isort: split
import torch
import torch._dynamo  # Adam's first step imports it: once here, not once per model

ROOT = Path(__file__).parents[2]
COMMAND = "python -m tests.conformance.matrix --out docs/model_support.md"
# A few of RecBole's models need these packages.
OPTIONAL = ("dgl", "torch-scatter", "faiss-cpu", "lightgbm", "xgboost")
VERSIONS = ("recbole", "torch", "numpy", "pandas", "scipy", *OPTIONAL)
LIMIT = 300.0  # seconds for a model


def version(package: str) -> str:
    """The version of an installed package, or ``none``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def fingerprint() -> str:
    """A hash of all that the outcomes depend on: this package, this suite, and versions."""
    digest = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in VERSIONS).encode())
    for folder in ("recbole_rcekd", "properties", "tests/conformance"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml") and file.name != "matrix.py":
                digest.update(file.read_bytes())
    digest.update((ROOT / "tests" / "helpers.py").read_bytes())
    return digest.hexdigest()[:16]


def run_model(model: Model, work: Path, key: str) -> None:
    """Try one model, and write the outcome to its file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(work)
    sys.argv = ["matrix"]
    started = time.perf_counter()
    found: dict[str, Any] = {"key": key, "facts": find_facts(model, work).as_dict()}
    found["teacher"] = checks.as_teacher(model, work).as_dict()
    if model.package == "sequential" and found["teacher"]["status"] == checks.WORKS:
        of_users = checks.as_teacher_of_users(model, work)
        found["teacher"]["users"] = ": ".join(filter(None, (of_users.status, of_users.note)))
    found["student"] = checks.as_student(model, work).as_dict()
    found["seconds"] = round(time.perf_counter() - started, 1)
    write(work, model, found)


def write(work: Path, model: Model, found: dict[str, Any]) -> None:
    """Keep the outcome of a model."""
    (outcome_file(work, model)).write_text(json.dumps(found, indent=1), encoding="utf-8")


def outcome_file(work: Path, model: Model) -> Path:
    """The file of an outcome."""
    return work / "outcomes" / f"{model.name}.json"


def kept(work: Path, model: Model, key: str) -> dict[str, Any] | None:
    """The outcomes of earlier runs with the same sources and versions."""
    file = outcome_file(work, model)
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if found["key"] == key else None


def run_all(models: list[Model], work: Path) -> dict[str, dict[str, Any]]:
    """Run the models without an outcome, then let plain RecBole open all new checkpoints."""
    key = fingerprint()
    fork = multiprocessing.get_context("fork")
    (work / "outcomes").mkdir(parents=True, exist_ok=True)
    write_world(work)
    for model in models:
        if kept(work, model, key) is not None:
            continue
        process = fork.Process(target=run_model, args=(model, work, key))
        process.start()
        process.join(LIMIT)
        found = kept(work, model, key)
        if found is None:
            how = (
                f"took over {LIMIT:.0f} s"
                if process.is_alive()
                else f"its process ended with {process.exitcode}"
            )
            process.kill()
            process.join()
            crash = checks.Outcome("failed", how).as_dict()
            found = {"key": key, "facts": {}, "teacher": crash, "student": crash, "seconds": LIMIT}
            write(work, model, found)
        print(
            f"{model.name}: teacher {found['teacher']['status']}, student "
            f"{found['student']['status']}",
            flush=True,
        )
    outcomes = {model.name: kept(work, model, key) or {} for model in models}
    fresh = [
        name
        for name, found in outcomes.items()
        if found["student"]["checkpoint"] and "plain" not in found
    ]
    opened = checks.open_in_plain_recbole(
        {name: outcomes[name]["student"]["checkpoint"] for name in fresh}, work
    )
    for model in models:
        found = outcomes[model.name]
        if model.name in fresh:
            found["plain"] = opened[model.name]
            student = checks.Outcome(**found["student"])
            checks.judge_plain(student, found["plain"])
            found["student"] = student.as_dict()
            write(work, model, found)
    return outcomes


def table(models: list[Model], outcomes: dict[str, dict[str, Any]]) -> str:
    """The text of ``docs/model_support.md``."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    now = datetime.datetime.now(datetime.UTC)
    count = {
        side: sum(outcomes[model.name][side]["status"] == checks.WORKS for model in models)
        for side in ("teacher", "student")
    }
    lines = [
        "# Which of RecBole's models can teach, and which can learn",
        "",
        f"Found by running, {now:%Y-%m-%d}: `{COMMAND}`, Python {sys.version.split()[0]}, "
        f"{versions}.",
        "",
        f"Of {len(models)} models {count['teacher']} teach and {count['student']} learn. *works* "
        "means, for a teacher: a student learned from it with RCE-KD (its loss on fixed item sets "
        "fell), and all scores it learned from were the model's own `full_sort_predict` (or "
        "`predict`, where RecBole's evaluation takes that); for a student: the same of its own "
        "scores, the loss fell, and plain RecBole, in a process without this package, opens the "
        "checkpoint and gets the same test metrics (of HSTU and VBPR, which are models of this "
        "package: a process that imports it). A sequential model teaches sequential students its "
        "scores of their own rows, and general students (BPR) those of each user's whole training "
        "sequence; both were tried. *scored* is how: from two tables (`product`), by full rows, or "
        "pair by pair. *loss* is RecBole's: the values of `loss_type` that train, or what a batch "
        "holds.",
        "",
        "| model | type | teacher | student | scored | loss | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        found = outcomes[model.name]
        teacher, student = found["teacher"], found["student"]
        facts = found["facts"]
        loss = ", ".join(facts.get("loss_types") or [facts.get("input_type", "").lower()])
        notes = [teacher["note"]] if teacher["note"] else []
        if teacher["users"] not in ("", checks.WORKS):
            notes.append(f"with BPR as student: {teacher['users']}")
        if student["note"] not in ("", *notes) and student["status"] != "teacher only":
            notes.append(f"as student: {student['note']}")
        # The path of a checkpoint does not matter here, and a bar would end the cell.
        note = re.sub(r"\[/[^\]]*\.pth\]", "[checkpoint]", "; ".join(notes)).replace("|", "\\|")
        scored = student["scored"] or teacher["scored"]
        lines.append(
            f"| {model.name} | {model.package.replace('_', '-')} | {teacher['status']} | "
            f"{student['status']} | {scored} | {loss} | {note} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="where the table goes (nowhere unless given)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "conformance", help="where runs are kept"
    )
    parser.add_argument(
        "--only", default="", help="names of models or packages, with commas between"
    )
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    models = [
        model for model in registry().values() if not only or {model.name, model.package} & only
    ]
    outcomes = run_all(models, options.work.absolute())
    text = table(models, outcomes)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    failed = [
        name
        for name, found in outcomes.items()
        if "failed" in (found["teacher"]["status"], found["student"]["status"])
    ]
    print(f"{len(models)} models, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
