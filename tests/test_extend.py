"""A loss and a teacher of a user's own, as docs/extend shows them."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd import DistillTrainer, load_teacher, run_recbole_kd
from recbole_rcekd.cli import main
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import TeacherSettings
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.losses.methods import find_loss, read_methods
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.load import TEACHERS
from tests.helpers import build, build_model, write_dataset

DOCS = Path(__file__).parents[1] / "docs" / "extend"
SETTINGS: dict[str, Any] = {
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "epochs": 2,
    "train_batch_size": 128,
    "embedding_size": 4,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "rce_pool": 30,
    "rce_samples": 10,
    "rce_top_k": 10,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data, in which commands run and modules can be imported."""
    write_dataset(tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_module", "my_teacher"):
        sys.modules.pop(name, None)


def code_in(page: str) -> list[str]:
    """The Python code blocks on a page of docs/extend."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(**given: Any) -> dict[str, Any]:
    settings = {**SETTINGS, "data_path": "dataset", **given.pop("settings", {})}
    return run_recbole_kd("BPR", "tiny", config_dict=settings, **given)


# --- a teacher: scores from a callable ------------------------------------------------------------


class CallableTeacher(Teacher):
    """A teacher whose scores are a function of users and the number of items."""

    functions: dict[str, Callable[[Tensor, int], Tensor]] = {}  # noqa: RUF012

    @classmethod
    def recognises(cls, source: str) -> bool:
        return source in cls.functions

    @classmethod
    def is_there(cls, source: str) -> bool:
        return True

    @classmethod
    def load(
        cls, source: str, student_dataset: Any, settings: TeacherSettings, trust: bool
    ) -> CallableTeacher:
        return cls(student_dataset, source)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:32]

    def score_all(self, contexts: Tensor) -> Tensor:
        scores = self.functions[self.name](contexts, self.n_items).float()
        scores[:, 0] = -torch.inf
        return scores


def test_a_teacher_from_a_callable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_id(users: Tensor, n_items: int) -> Tensor:
        return torch.arange(n_items).expand(len(users), -1) / 10

    monkeypatch.setitem(CallableTeacher.functions, "by_id", by_id)
    monkeypatch.setitem(TEACHERS, "callable", CallableTeacher)
    # From the teacher alone, to the last epoch: validation would stop a student that learns this.
    settings = {"kd_base_weight": 0, "epochs": 40, "learning_rate": 0.05, "eval_step": 0}
    found = run(teacher="by_id", kd_loss="rce", settings=settings)
    assert found["teacher"]["model"] == "by_id"
    assert (found["teacher"]["parameters"], found["teacher"]["checkpoint_bytes"]) == (0, 0)
    # The student ranks like the function: the highest ids first.
    bundle = build(place / "dataset", embedding_size=4)
    student = load_teacher(found["runs"][0]["checkpoint"], bundle.train)
    top = student.score_all(torch.arange(1, student.n_contexts)).topk(10).indices.double()
    assert float(top.mean()) > 0.8 * bundle.dataset.item_num


def test_a_teacher_by_its_object(place: Path) -> None:
    CallableTeacher.functions["zeros"] = lambda users, n: torch.zeros(len(users), n)
    bundle = build(place / "dataset", **SETTINGS, kd_cache_dir="scores")
    teacher = CallableTeacher(bundle.train._dataset, "zeros")
    trainer = DistillTrainer(bundle.config, build_model(bundle), teacher)
    trainer.fit(bundle.train, bundle.valid)
    assert "kd_loss" in trainer.history.rows[0]


class PlainScores:
    """A table of scores that knows nothing of this package."""

    def __init__(self, scores: Tensor) -> None:
        self.table = scores
        self.table[:, 0] = -torch.inf
        self.n_contexts, self.n_items = scores.shape

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        return self.table[contexts].gather(1, items.long())

    def score_all(self, contexts: Tensor) -> Tensor:
        return self.table[contexts].clone()

    def top_k(self, contexts: Tensor, k: int, unseen: bool) -> Tensor:
        return self.table[contexts].topk(k).indices

    def transposed(self) -> PlainScores:
        return PlainScores(self.table.t().clone())


@pytest.mark.parametrize("how", ["raw", "standardised"])
def test_scores_of_any_class(place: Path, how: str) -> None:
    bundle = build(place / "dataset", **SETTINGS, kd_teacher_scores=how)
    data = bundle.train._dataset
    scores: Any = PlainScores(torch.randn(int(data.user_num), int(data.item_num)))
    trainer = DistillTrainer(bundle.config, build_model(bundle), scores)
    trainer.fit(bundle.train, bundle.valid)
    assert trainer.history.rows[0]["kd_loss"] > 0


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Path("saved") / "a.pth", r"the name of a file: open it with load_teacher\('saved/a.pth'"),
        (torch.nn.Linear(2, 2), r"\[teacher\] is a Linear, but must be what load_teacher returns"),
        ({"scores": 1}, r"\[teacher\] is a dict, but must be what load_teacher returns"),
    ],
)
def test_what_is_no_teacher(place: Path, teacher: Any, message: str) -> None:
    bundle = build(place / "dataset", **SETTINGS)
    with pytest.raises(SettingsError, match=message):
        DistillTrainer(bundle.config, build_model(bundle), teacher)


def test_a_teacher_of_ones_own_beside_a_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CallableTeacher.functions, "ones", lambda u, n: torch.ones(len(u), n))
    monkeypatch.setitem(TEACHERS, "callable", CallableTeacher)
    first = run(teacher="ones", kd_loss="scratch")["runs"][0]["checkpoint"]
    found = run(teacher=f"ones,{first}", kd_loss="rce")
    assert found["teacher"]["model"] == "ones + BPR"


def test_the_page_about_teachers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, second = code_in("teacher.md")
    (place / "my_teacher.py").write_text(first + "\n\n" + second, encoding="utf-8")
    monkeypatch.setattr("recbole_rcekd.teachers.load.TEACHERS", TEACHERS.copy())
    import my_teacher  # type: ignore[import-not-found]  # noqa: F401

    found = run(teacher="popularity:2.0", kd_loss="rce")
    assert found["teacher"]["model"] == "popularity"
    assert found["test_result"]["ndcg@10"] > 0


# --- a loss ---------------------------------------------------------------------------------------


@pytest.fixture
def own_loss(place: Path) -> Path:
    """The folder with the loss of docs/extend/loss.md as a module."""
    (place / "my_module.py").write_text(code_in("loss.md")[0], encoding="utf-8")
    return place


def test_the_page_about_losses(own_loss: Path) -> None:
    names = "my_module:MarginLoss,rce+my_module:MarginLoss"
    settings = {"margin_top_k": 7, "margin_learning_rate": 0.02}
    found = run(
        teacher="BPR", kd_loss=names, output_dir="out", settings={"teacher_epochs": 2, **settings}
    )
    assert [each["loss"] for each in found["runs"]] == names.split(",")
    alone, both = (each["settings"] for each in found["runs"])
    assert (alone["margin_top_k"], alone["margin_gap"], alone["learning_rate"]) == (7, 0.5, 0.02)
    assert {"rce_weight", "margin_weight"} <= both.keys()
    folder = own_loss / "out" / "my_module.MarginLoss-seed2020"
    assert (folder / "run.json").exists()
    assert "kd_loss" in (folder / "history.csv").read_text(encoding="utf-8")


def test_the_formula_of_the_page(own_loss: Path) -> None:
    from recbole_rcekd.core.types import ItemSets

    loss_type: Any = find_loss("my_module:MarginLoss")
    loss = loss_type(loss_type.settings_type(margin_top_k=2))
    items = torch.tensor([[1, 2, 3, 4], [5, 0, 6, 0]])
    scores = torch.tensor([[1.0, 0.0, 0.8, 0.2], [1.0, 9.0, 2.0, 0.0]])
    value = loss.forward(scores, ItemSets(items, keep=items != 0))
    # Mean of 0.5 − (1.0 − 0.8) and 0.5 − (0.0 − 0.2); the second row has one pair.
    torch.testing.assert_close(value, torch.tensor([(0.3 + 0.7) / 2, 0.5 + 1.0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin_topk": 7}, r"\[margin_topk\] is not a setting .* mean \[margin_top_k\]"),
        ({"margin_gap": 0.0}, r"\[margin_gap\] is 0.0, but must be above 0"),
        ({"margin_top_k": 1.5}, r"\[margin_top_k\] is 1.5 \(float\), but must be of type int"),
    ],
)
def test_its_keys_are_checked(own_loss: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(teacher="BPR", kd_loss="my_module:MarginLoss", settings=settings)
    assert not (own_loss / "saved").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_module:MarginLoss", r"there is no module 'no_module': run the command in its folder"),
        ("my_module:MarginLos", r"'MarginLos' in \[.*my_module.py\] is no subclass of .*KDLoss"),
        ("my_module:MarginSettings", r"'MarginSettings' in .* is no subclass"),
        ("my_module:", r"'nothing' in .* is no subclass"),
        ("os:path", r"'path' in .* is no subclass"),
        ("my_module:MarginLoss+my_module:MarginLoss", r"names each of its methods once"),
    ],
)
def test_names_of_losses_that_are_refused(own_loss: Path, name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_methods(name)


@pytest.mark.parametrize("prefix", ["rce", "scratch", "", "margi"])
def test_prefixes_that_are_refused(own_loss: Path, prefix: str) -> None:
    file = own_loss / "my_module.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('prefix = "margin"', f"prefix = {prefix!r}"), encoding="utf-8")
    with pytest.raises(SettingsError, match="prefix"):
        run(teacher="BPR", kd_loss="my_module:MarginLoss")


def test_a_module_that_fails_says_why(own_loss: Path) -> None:
    (own_loss / "my_module.py").write_text("import not_installed_here\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        find_loss("my_module:MarginLoss")


def test_a_command_finds_modules_where_it_runs(
    own_loss: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(own_loss)])
    words = [f"--{key}={value}" for key, value in SETTINGS.items() if not isinstance(value, list)]
    words += ["--metrics=['NDCG']", "--topk=[10]", "--data_path=dataset", "--teacher_epochs=1"]
    words += ["--model=BPR", "--dataset=tiny", "--teacher=BPR"]
    assert main([*words, "--kd_loss=my_module:MarginLoss", "--output_dir=out"]) == 0
    assert (own_loss / "out" / "my_module.MarginLoss-seed2020" / "run.json").exists()
    assert main([*words, "--kd_loss=my_module:MarginLoss", "--margin_tok_k=3"]) == 2
    assert "Did you mean [margin_top_k]?" in capsys.readouterr().err


def test_every_loss_here_is_named_by_its_prefix() -> None:
    assert {name: loss.prefix() for name, loss in LOSSES.items()} == {name: name for name in LOSSES}
