"""Every model of RecBole as teacher and as student.

A few models of each kind are always tested, and must work. All others are tested with
``pytest tests/conformance -m slow``. Their results are in no list: a model works, or is refused in
one line, or plain RecBole itself cannot run it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from tests.conformance import checks
from tests.conformance.models import Model, registry
from tests.conformance.world import write_world

MODELS = registry()
# One model for each way to be scored, trained or saved
TEACH = ("BPR", "EASE", "NeuMF", "RaCT", "CKE", "FwFM", "SASRecF", "BERT4Rec", "CORE", "HSTU")
LEARN = (
    "LightGCN",
    "MacridVAE",
    "RecVAE",
    "CFKG",
    "MKR",
    "FM",
    "SASRec",
    "FPMC",
    "BERT4Rec",
    "DIN",
)
TEACH_USERS = ("SASRec",)
LEARN_FROM_USERS = ("GRU4Rec",)
SEQUENTIAL = [name for name, model in MODELS.items() if model.package == "sequential"]


def some(names: tuple[str, ...], of: Iterable[str] = MODELS) -> list[object]:
    """All models; those not named are marked slow."""
    return [
        pytest.param(MODELS[name], id=name, marks=() if name in names else pytest.mark.slow)
        for name in of
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("conformance"))


@pytest.fixture(scope="module")
def students(world: Path) -> dict[str, checks.Outcome]:
    """The outcomes of students, for the last test, which opens all their checkpoints at once."""
    return {}


def test_the_registry_is_what_recbole_can_find() -> None:
    """RecBole's ``get_model`` finds each model, if the packages that it needs are installed."""
    from recbole.utils import get_model

    assert len(MODELS) >= 94
    assert {model.package for model in MODELS.values()} >= {
        "general",
        "sequential",
        "knowledge_aware",
        "context_aware",
    }
    for name, model in MODELS.items():
        if model.package not in ("exlib",):
            assert get_model(name).__name__ == name


@pytest.mark.parametrize("model", some(TEACH))
def test_teaches_or_says_why_not(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    monkeypatch.chdir(tmp_path)
    found = checks.as_teacher(model, world)
    assert found.status != "failed", found.note
    if model.name in TEACH:
        assert found.status == checks.WORKS, found.note


@pytest.mark.parametrize("model", some(LEARN))
def test_learns_or_says_why_not(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    students: dict[str, checks.Outcome],
    model: Model,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = students[model.name] = checks.as_student(model, world)
    assert found.status != "failed", found.note
    if model.name in LEARN:
        assert found.status == checks.WORKS, found.note


@pytest.mark.parametrize("model", some(TEACH_USERS, of=SEQUENTIAL))
def test_teaches_general_models(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    monkeypatch.chdir(tmp_path)
    found = checks.as_teacher_of_users(model, world)
    assert found.status in (checks.WORKS, "not possible"), found.note


@pytest.mark.parametrize("model", some(LEARN_FROM_USERS, of=LEARN_FROM_USERS))
def test_learns_from_a_general_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    monkeypatch.chdir(tmp_path)
    found = checks.as_student_of_users(model, world)
    assert found.status == checks.WORKS, found.note


def test_plain_recbole_opens_what_they_left(
    world: Path, students: dict[str, checks.Outcome]
) -> None:
    """In one process that cannot import this package."""
    works = {name: found for name, found in students.items() if found.status == checks.WORKS}
    if not works:
        pytest.skip("no student was trained here")
    opened = checks.open_in_plain_recbole(
        {name: found.checkpoint for name, found in works.items()}, world
    )
    wanted = {name: found.test_result for name, found in works.items()}
    if int(np.__version__.split(".")[0]) >= 2 and opened != wanted:
        pytest.skip(
            f"RecBole 1.2.1 itself does not start with numpy 2: {next(iter(opened.values()))}"
        )
    assert opened == wanted
