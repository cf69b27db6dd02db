"""The rules of CONTRIBUTING.md: imports, what every loss consists of, what is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import recbole_rcekd
from recbole_rcekd import models
from recbole_rcekd.core import errors
from recbole_rcekd.losses import LOSSES

ROOT = Path(__file__).parents[1]
PACKAGE = Path(recbole_rcekd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# The rooms in the order in which they may import: each only what stands before it.
ROOMS = [
    "core",
    "compat",
    "losses",
    "data",
    "models",
    "teachers",
    "training",
    "evaluation",
    "experiment",
    "quick_start",
    "tuning",
    "cli",
]
WITHOUT_RECBOLE = {"core", "losses"}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def imports(name: str) -> set[str]:
    """Full names of the modules that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            source = node.module or ""
            found |= {
                full if (full := f"{source}.{alias.name}") in MODULES else source
                for alias in node.names
            }
    return found


def room(name: str) -> str:
    """``recbole_rcekd.losses.rce`` → ``losses``; of the package itself the empty string."""
    return [*name.split("."), ""][1]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in MODULES} == {"", *ROOMS}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name)))
def test_a_room_imports_only_what_stands_before_it(name: str) -> None:
    allowed = ROOMS[: ROOMS.index(room(name)) + 1]
    own = {other for other in imports(name) if other.split(".")[0] == "recbole_rcekd"}
    assert not {other for other in own if room(other) not in allowed}
    if room(name) in WITHOUT_RECBOLE:
        assert not [other for other in imports(name) if other.split(".")[0] == "recbole"]


@pytest.mark.parametrize("name", ROOMS)
def test_every_room_says_what_it_is_for(name: str) -> None:
    """In three sentences, or more; a module of the front in one."""
    text = ast.get_docstring(MODULES[f"recbole_rcekd.{name}"]) or ""
    sentences = re.findall(r"\.(?=\s|$)", text)
    assert len(sentences) >= (3 if (PACKAGE / name).is_dir() else 1)


def test_no_import_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name in done:
            return
        for other in imports(name) & set(MODULES) - {"recbole_rcekd"}:
            if other != name:
                visit(other, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def test_only_compat_knows_ray_and_versions() -> None:
    for name, tree in MODULES.items():
        if room(name) == "compat":
            continue
        assert not [
            other
            for other in imports(name)
            if other.split(".")[0] in ("ray", "packaging", "pkg_resources")
        ]
        words = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not [word for word in words if re.search(r"\bray\b", word)], name
        compared = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare)
            and any(
                isinstance(part, ast.Attribute) and part.attr == "__version__"
                for part in ast.walk(node)
            )
        ]
        assert not compared, name


# --- what a loss consists of ----------------------------------------------------------------------


def loss_files(folder: str, pattern: str, without: frozenset[str] = frozenset()) -> set[str]:
    found = {path.stem.removeprefix("test_") for path in (ROOT / folder).glob(pattern)}
    return found - {"__init__", *without}


def test_every_loss_has_all_its_pieces_and_no_piece_is_left_over() -> None:
    headings = re.findall(
        r"^## .*", (ROOT / "METHODS.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    pieces = {
        "properties/loss/*.yaml": loss_files("properties/loss", "*.yaml"),
        "properties/hyper/*.test": loss_files("properties/hyper", "*.test", frozenset({"scratch"})),
        "recbole_rcekd/losses/*.py": loss_files(
            "recbole_rcekd/losses", "*.py", frozenset({"base", "candidates", "methods"})
        ),
        "tests/losses/test_*.py": loss_files(
            "tests/losses",
            "test_*.py",
            frozenset({"contract", "embedding_contract", "candidates", "theory"}),
        ),
        "tests/reference/*.py": loss_files("tests/reference", "*.py"),
        "METHODS.md": {name for heading in headings for name in re.findall(r"`(\w+)`", heading)},
    }
    for place, names in pieces.items():
        assert names == set(LOSSES), place


@pytest.mark.parametrize("name", LOSSES)
def test_every_default_is_in_methods(name: str) -> None:
    text = (ROOT / "METHODS.md").read_text(encoding="utf-8")
    keys = LOSSES[name].settings_type.keys()
    assert f"{name}_weight" in keys
    undocumented = [key for key in keys if f"`{key}" not in text]
    # Switches are described where they are explained; a number without a source would be missing
    # here.
    assert not undocumented or undocumented == ["rce_gamma_value"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "properties").rglob("*.yaml")), ids=lambda path: path.name
)
def test_every_key_of_a_yaml_says_type_and_purpose(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("#")
    content = yaml.safe_load(text)
    assert isinstance(content, dict)
    for key in content:
        (line,) = re.findall(rf"^{key}:.*", text, re.MULTILINE)
        assert re.search(r"  ?# \((str|int|float|bool|list|dict|None)[^)]*\) \S", line), line


def test_every_model_has_its_yaml_and_its_test() -> None:
    names = set(models.MODELS)
    assert {path.stem for path in (ROOT / "properties/model").glob("*.yaml")} == names
    for name, entry in models.MODELS.items():
        assert (PACKAGE / "models" / f"{name.lower()}.py").exists()
        assert (ROOT / "tests" / "models" / f"test_{name.lower()}.py").exists(), entry


# --- documentation and style ----------------------------------------------------------------------

ERROR_NAMES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.KDError)
}
Definition = ast.FunctionDef | ast.ClassDef


def public_definitions() -> Iterator[tuple[str, Definition, str]]:
    """(module, node, docstring of the class around it) of public functions, classes and methods."""
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield name, node, ""
                if isinstance(node, ast.ClassDef):
                    for inner in node.body:
                        if isinstance(inner, Definition) and not inner.name.startswith("_"):
                            yield name, inner, ast.get_docstring(node) or ""


def raised_here(node: Definition) -> set[str]:
    """Our errors that a function raises; of a class, ``__init__`` and ``__post_init__``."""
    bodies: list[ast.AST] = [node]
    if isinstance(node, ast.ClassDef):
        bodies = [
            n
            for n in node.body
            if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "__post_init__")
        ]
    found = set()
    for body in bodies:
        for part in ast.walk(body):
            if (
                isinstance(part, ast.Raise)
                and isinstance(part.exc, ast.Call)
                and isinstance(part.exc.func, ast.Name)
            ):
                found.add(part.exc.func.id)
    return found & ERROR_NAMES


def is_property(node: Definition) -> bool:
    return any(isinstance(d, ast.Name) and d.id.endswith("property") for d in node.decorator_list)


def test_everything_public_is_documented() -> None:
    inherited = {"forward", "select", "full_sort_predict"}
    missing = [
        f"{name}.{node.name}"
        for name, node, _ in public_definitions()
        if not ast.get_docstring(node) and node.name not in inherited
    ]
    assert not missing


def test_what_is_raised_is_documented() -> None:
    def documented(text: str) -> bool:
        return "Raises:" in text

    silent = {
        f"{name.removeprefix('recbole_rcekd.')}.{node.name}"
        for name, node, around in public_definitions()
        if raised_here(node)
        and not is_property(node)
        and not documented((ast.get_docstring(node) or "") + around)
    }
    # Called by the constructor of all settings, which documents it.
    assert silent == {"losses.rce.check_relations", "losses.cd.check_relations"}


def test_no_assert_in_the_package() -> None:
    """``python -O`` drops them."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_no_print_but_the_commands() -> None:
    for name, tree in MODULES.items():
        calls = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert room(name) == "cli" or not [n for n in calls if getattr(n.func, "id", "") == "print"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        result = doctest.testmod(module)
    assert result.failed == 0


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder()
    examples = [
        e
        for name in MODULES
        for t in finder.find(importlib.import_module(name))
        for e in t.examples
    ]
    assert examples


def test_the_names_that_users_import() -> None:
    for name in recbole_rcekd.__all__:
        assert getattr(recbole_rcekd, name).__doc__
