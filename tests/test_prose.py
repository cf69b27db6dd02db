"""The words: lines that can be read, links that lead somewhere, examples that run."""

from __future__ import annotations

import ast
import io
import random
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = 100
FOLDERS = ("recbole_rcekd", "tests", "benchmarks", "docs", "results", "properties")


def files(pattern: str) -> list[Path]:
    """All files of a kind that belong to the repository."""
    found = [
        *ROOT.glob(pattern),
        *(f for folder in FOLDERS for f in (ROOT / folder).rglob(pattern)),
    ]
    return sorted(file for file in set(found) if "_build" not in file.parts)


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def prose_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are neither a table nor code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    ") and not line.lstrip().startswith("|"):
            yield number, line


def prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of comments and docstrings, without formulas and examples."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], lines[token.start[0] - 1]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if ast.get_docstring(node) is None:
            continue
        constant: Any = node.body[0]
        formula: int | None = None
        for number in range(constant.lineno, constant.end_lineno + 1):
            line = lines[number - 1]
            indent = len(line) - len(line.lstrip())
            if line.lstrip().startswith(".. math::"):
                formula = indent
            elif line.strip() and formula is not None and indent <= formula:
                formula = None
            if formula is None and not line.lstrip().startswith((">>>", "...")):
                yield number, line


@pytest.mark.parametrize("file", files("*.md"), ids=named)
def test_lines_of_markdown(file: Path) -> None:
    lines = prose_of_markdown(file.read_text(encoding="utf-8"))
    assert not [f"{named(file)}:{n}" for n, line in lines if len(line) > COLUMNS]


@pytest.mark.parametrize("file", files("*.yaml"), ids=named)
def test_lines_of_yaml(file: Path) -> None:
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    assert not [f"{named(file)}:{n}" for n, line in lines if len(line) > COLUMNS]


def test_lines_of_python() -> None:
    found = [
        f"{named(file)}:{number}"
        for file in files("*.py")
        for number, line in prose_of_python(file.read_text(encoding="utf-8"))
        if len(line) > COLUMNS
    ]
    assert not found


def test_long_lines_are_seen() -> None:
    """So that the two tests above can fail."""
    long = "word " * 30
    assert [
        n for n, _ in prose_of_markdown(f"a\n{long}\n| {long}\n```\n{long}\n```\n    {long}\n")
    ] == [1, 2]
    code = (
        f'"""One.\n\n{long}\n\n.. math:: {long}\n    {long}\n\n>>> {long}\n"""\nx = 1  # {long}\n'
    )
    assert [n for n, line in prose_of_python(code) if len(line) > COLUMNS] == [10, 3]


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("file", files("*.md"), ids=named)
def test_links_lead_to_files(file: Path) -> None:
    targets = re.findall(r"\]\(([^()\s]+)\)", file.read_text(encoding="utf-8"))
    relative = [each.partition("#")[0] for each in targets if not each.startswith(("http", "#"))]
    assert not [target for target in relative if not (file.parent / target).exists()]


@pytest.mark.parametrize("file", files("*.md"), ids=named)
def test_links_lead_to_headings(file: Path) -> None:
    def anchors(page: Path) -> set[str]:
        text = page.read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        found = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
        found |= set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))
        for included in re.findall(r"^```\{include\} (\S+)", text, re.MULTILINE):
            found |= anchors(page.parent / included)
        return found

    targets = re.findall(r"\]\(([^()\s]*)#([^()\s]+)\)", file.read_text(encoding="utf-8"))
    for target, anchor in targets:
        page = file.parent / target if target else file
        if not target.startswith("http") and page.suffix == ".md":
            assert anchor in anchors(page), f"{target}#{anchor}"


def test_the_architecture_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "recbole_rcekd"
    rooms = [folder for folder in package.iterdir() if (folder / "__init__.py").exists()]
    for room in rooms:
        row = re.search(rf"^\| .*`(?:{room.name}/|{room.name})`.*$", page, re.MULTILINE)
        assert row or room.name in ("cli", "properties"), room.name
        if row and room.name not in ("losses", "cli"):  # a file for each method, or verb
            stems = {file.stem for file in room.glob("*.py")} - {"__init__"}
            assert not [stem for stem in sorted(stems) if f"`{stem}`" not in row[0]]


# --- examples -------------------------------------------------------------------------------------


def test_the_front_pages_python(tmp_path: Path) -> None:
    """Block after block in one process, as a reader would try them; with few epochs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    draw = random.Random(0)
    rows = [f"{user},{item},x" for user in range(1, 121) for item in draw.sample(range(1, 261), 15)]
    (tmp_path / "clicks.csv").write_text("\n".join(["user,item,other", *rows]), encoding="utf-8")
    (tmp_path / "front.py").write_text("\n".join(blocks), encoding="utf-8")
    words = ["--epochs=1", "--teacher_epochs=1", "--state=ERROR", "--show_progress=False"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "front.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "saved").glob("BPR-rce-*.pth"))
