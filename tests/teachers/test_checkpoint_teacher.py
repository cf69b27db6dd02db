"""A teacher scores by the student's ids, is frozen, draws nothing, and has the same data."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.errors import KDError, ScoringError, TeacherError
from recbole_rcekd.data.fingerprint import split_hash, training_interactions
from recbole_rcekd.teachers import checkpoint_teacher as teacher_module
from recbole_rcekd.teachers import same_data as training_data
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from tests.helpers import (
    Bundle,
    block_pairs,
    build,
    build_model,
    save_untrained,
    train_and_save,
    write_atomic_file,
    write_dataset,
    write_knowledge,
)

# isort: split
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

SMALL: dict[str, Any] = {"embedding_size": 8}
IN_TIME: dict[str, Any] = {
    "eval_args": {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "group_by": "user",
        "order": "TO",
        "mode": "full",
    },
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set `tiny`, last interactions first, and `BPR.pth`, trained on it."""
    folder = tmp_path_factory.mktemp("teacher")
    write_atomic_file(
        folder / "tiny" / "tiny.inter",
        ("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
        [(user, item, 1 + n % 5, -n) for n, (user, item) in enumerate(block_pairs())],
    )
    write_knowledge(folder)
    train_and_save(build(folder, "BPR", **SMALL), folder / "BPR.pth")
    return folder


@pytest.fixture(scope="module")
def student(folder: Path) -> Bundle:
    return build(folder, "BPR", embedding_size=4)


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with something else in it."""
    content = torch.load(source, weights_only=False)
    change(content)
    torch.save(content, target, pickle_protocol=4)
    return target


def with_settings(source: Path, target: Path, **settings: Any) -> Path:
    def change(content: dict[str, Any]) -> None:
        for key, value in settings.items():
            content["config"][key] = value

    return changed(source, target, change)


def random_states() -> tuple[Any, Any, str]:
    of_numpy = np.random.get_state()  # noqa: NPY002
    return torch.random.get_rng_state().tolist(), random.getstate(), str(of_numpy)


def by_token(scores: Tensor, dataset: Any) -> dict[tuple[str, str], float]:
    """Full rows as a dict, so that only tokens can be compared."""
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    rows = scores.tolist()
    return {
        (str(users[u]), str(items[i])): rows[u][i]
        for u in range(1, dataset.user_num)
        for i in range(1, dataset.item_num)
    }


def assert_aligned(teacher: Teacher, student: Bundle, model: Any, own: Bundle) -> None:
    """For every pair of tokens, the teacher says what its model says in its own ids."""
    with torch.no_grad():
        rows = model.full_sort_predict(Interaction({"user_id": torch.arange(own.dataset.user_num)}))
    expected = by_token(rows.view(own.dataset.user_num, -1), own.dataset)
    everything = teacher.score_all(torch.arange(student.dataset.user_num))
    assert (everything[:, 0] == -torch.inf).all()
    got = by_token(everything, student.dataset)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    factors = teacher.factors()
    assert factors is not None
    assert by_token(factors[0] @ factors[1].t(), student.dataset) == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )


def test_frozen(folder: Path, student: Bundle) -> None:
    teacher = read_teacher(folder / "BPR.pth", student.train)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.score_all(torch.tensor([1, 2])).requires_grad
    factors = teacher.factors()
    assert factors is not None
    assert not any(table.requires_grad for table in factors)
    assert not teacher.model.training
    assert (teacher.n_contexts, teacher.n_items) == (
        student.dataset.user_num,
        student.dataset.item_num,
    )
    assert teacher.user_tokens(torch.tensor([1, 2])) == list(
        student.dataset.field2id_token["user_id"][1:3]
    )


def test_same_data_is_not_read_again(
    folder: Path, student: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the teacher's data were read")

    monkeypatch.setattr(training_data, "create_dataset", never)
    monkeypatch.setattr(teacher_module, "get_model", Building())
    for data in (student.train, student.train._dataset):
        teacher = read_teacher(folder / "BPR.pth", data)
        assert teacher.user_ids is None
        assert teacher.fingerprint  # and neither this nor loading has built the model
    own = build(folder, "BPR", **SMALL)
    monkeypatch.undo()
    model = build_model(own)
    model.load_state_dict(torch.load(folder / "BPR.pth", weights_only=False)["state_dict"])
    assert_aligned(read_teacher(folder / "BPR.pth", student.train), student, model.eval(), own)


class Building:
    """Stands for `get_model`: a class may be asked for, an object may not be made."""

    type = ModelType.GENERAL

    def __call__(self, *args: Any) -> Any:
        assert len(args) == 1, "the model was built"
        return self


def test_other_ids_are_translated_by_token(folder: Path, tmp_path: Path) -> None:
    """`rm_dup_inter` sorts by time before ids are given; the interactions stay the same."""
    student = build(folder, "BPR", **IN_TIME)
    own = build(folder, "BPR", rm_dup_inter="first", **SMALL, **IN_TIME)
    model = train_and_save(own, tmp_path / "x.pth")
    for field in ("user_id", "item_id"):
        assert list(own.dataset.field2id_token[field]) != list(
            student.dataset.field2id_token[field]
        )
    teacher = read_teacher(tmp_path / "x.pth", student.train)
    assert teacher.user_ids is not None
    assert_aligned(teacher, student, model, own)


@pytest.mark.parametrize("settings", [{}, {"rm_dup_inter": "first"}])
def test_knowledge_aware_teacher(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    student = build(folder, "BPR", **IN_TIME)
    columns = {
        "load_col": {
            **IN_TIME["load_col"],
            "kg": ["head_id", "relation_id", "tail_id"],
            "link": None,
        }
    }
    columns["load_col"]["link"] = ["item_id", "entity_id"]
    own = build(folder, "CKE", **SMALL, kg_embedding_size=8, **{**IN_TIME, **columns, **settings})
    model = train_and_save(own, tmp_path / "x.pth")
    assert_aligned(read_teacher(tmp_path / "x.pth", student.train), student, model, own)


def test_missing_tokens_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    """A knowledge-aware dataset drops the items without an entity."""
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    without = {f"i{n}" for n in range(0, 60, 5)}
    write_knowledge(tmp_path, without=without)
    student = build(tmp_path, "BPR")
    save_untrained(build(tmp_path, "CKE", **SMALL), tmp_path / "x.pth")
    with pytest.raises(
        TeacherError, match=r"does not know 12 of the student's 60 values of \[item_id\]"
    ) as caught:
        read_teacher(tmp_path / "x.pth", student.train)
    message = str(caught.value)
    named = message.split("[item_id]: ")[1].split(", …. Use the same filters")[0].split(", ")
    assert len(named) == 5
    assert set(named) < without

    write_knowledge(tmp_path, without={"i7"})
    with pytest.raises(
        TeacherError, match=r"does not know 1 of the student's 60 values of \[item_id\]: i7\. Use"
    ):
        read_teacher(tmp_path / "x.pth", student.train)


def test_other_seed_is_refused(folder: Path, student: Bundle, tmp_path: Path) -> None:
    own = build(folder, "BPR", seed=7, **SMALL)
    save_untrained(own, tmp_path / "x.pth")

    def pairs(bundle: Bundle) -> set[tuple[str, str]]:
        data = bundle.train._dataset
        users, items = data.inter_feat["user_id"], data.inter_feat["item_id"]
        return set(
            zip(data.id2token("user_id", users), data.id2token("item_id", items), strict=True)
        )

    mine, theirs = pairs(student), pairs(own)
    assert 0 < len(mine & theirs) < len(mine)
    with pytest.raises(
        TeacherError, match="learned from other interactions than this student will"
    ) as caught:
        read_teacher(tmp_path / "x.pth", student.train)
    assert f": {len(mine & theirs)} of the student's {len(mine)} training interactions are" in str(
        caught.value
    )
    assert f"among the teacher's {len(theirs)}, so" in str(caught.value)
    assert "Train it with the same seed" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "val_interval": {"rating": "[3,inf)"},
            "load_col": {"inter": ["user_id", "item_id", "rating"]},
        },
        {"item_inter_num_interval": "[9,inf)"},
        {"eval_args": {**IN_TIME["eval_args"], "order": "RO", "split": {"RS": [0.6, 0.2, 0.2]}}},
        {"eval_args": {**IN_TIME["eval_args"], "order": "RO", "split": {"LS": "test_only"}}},
        {"eval_args": {**IN_TIME["eval_args"], "order": "RO", "group_by": "none"}},
        IN_TIME,
    ],
    ids=["values", "counts", "ratio", "leave one out", "not by user", "in time"],
)
def test_other_filter_or_split_is_refused(
    folder: Path, student: Bundle, tmp_path: Path, settings: dict[str, Any]
) -> None:
    save_untrained(build(folder, "BPR", **{**SMALL, **settings}), tmp_path / "x.pth")
    with pytest.raises(TeacherError, match=r"learned from other interactions|does not know"):
        read_teacher(tmp_path / "x.pth", student.train)


@pytest.mark.parametrize(
    "part",
    [
        {"mode": {"valid": "uni100", "test": "uni100"}},
        # The same split in other words: a tenth of twelve interactions is one.
        {"split": {"LS": "valid_and_test"}},
    ],
)
def test_other_settings_with_the_same_outcome_are_accepted(
    folder: Path, student: Bundle, tmp_path: Path, part: dict[str, Any]
) -> None:
    save_untrained(
        build(folder, "BPR", **SMALL, eval_args={**student.config["eval_args"], **part}),
        tmp_path / "x.pth",
    )
    teacher = read_teacher(tmp_path / "x.pth", student.train)
    assert (teacher.n_contexts, teacher.n_items) == (
        student.dataset.user_num,
        student.dataset.item_num,
    )


def test_seed_that_decides_nothing(folder: Path, tmp_path: Path) -> None:
    """A split in time has no randomness, so teachers of all seeds have the same interactions."""
    student = build(folder, "BPR", **IN_TIME)
    own = build(folder, "BPR", seed=7, **SMALL, **IN_TIME)
    model = train_and_save(own, tmp_path / "x.pth")
    assert_aligned(read_teacher(tmp_path / "x.pth", student.train), student, model, own)


def test_ready_split_ignores_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = block_pairs()
    for n, part in enumerate(("train", "valid", "test")):
        rows = [pair for m, pair in enumerate(pairs) if min(m % 10, 2) == 2 - n]
        write_atomic_file(
            tmp_path / "tiny" / f"tiny.{part}.inter", ("user_id:token", "item_id:token"), rows
        )
    ready: dict[str, Any] = {"benchmark_filename": ["train", "valid", "test"]}
    student = build(tmp_path, "BPR", seed=1, **ready)
    save_untrained(build(tmp_path, "BPR", seed=2, **SMALL, **ready), tmp_path / "x.pth")
    monkeypatch.setattr(training_data, "create_dataset", None)  # nothing is read again
    assert read_teacher(tmp_path / "x.pth", student.train).user_ids is None


def test_other_dataset_is_refused(folder: Path, student: Bundle, tmp_path: Path) -> None:
    path = with_settings(folder / "BPR.pth", tmp_path / "x.pth", dataset="ml-1m")
    with pytest.raises(
        TeacherError, match=r"was trained on \[ml-1m\], the student's dataset is \[tiny\]"
    ):
        read_teacher(path, student.train)


def test_weights_that_do_not_fit(folder: Path, student: Bundle, tmp_path: Path) -> None:
    path = with_settings(folder / "BPR.pth", tmp_path / "x.pth", embedding_size=5)
    with pytest.raises(
        TeacherError, match="do not fit a BPR on this dataset: it was trained on other data"
    ) as caught:
        read_teacher(path, student.train).model  # noqa: B018
    assert "\n" not in str(caught.value)

    # The same name and settings, other files, where the teacher's own are gone.
    write_dataset(tmp_path, pairs=block_pairs(n_users=30))
    other = build(tmp_path, "BPR")
    moved = with_settings(folder / "BPR.pth", tmp_path / "y.pth", data_path=str(tmp_path / "gone"))
    with pytest.raises(TeacherError, match="do not fit a BPR on this dataset"):
        read_teacher(moved, other.train).scorer  # noqa: B018


def test_the_same_settings_of_other_files_are_another_split(folder: Path, tmp_path: Path) -> None:
    """Ready splits with the same names in two folders: one tests what the other trains on."""
    pairs = block_pairs()
    for name, first in (("one", 0), ("two", 1)):
        for part, rows in (
            ("train", pairs[first::2]),
            ("valid", pairs[:5]),
            ("test", pairs[1 - first :: 2]),
        ):
            file = tmp_path / name / "tiny" / f"tiny.{part}.inter"
            write_atomic_file(file, ["user_id:token", "item_id:token"], rows)
    ready: dict[str, Any] = {
        "benchmark_filename": ["train", "valid", "test"],
        "checkpoint_dir": str(tmp_path),
    }
    save_untrained(build(tmp_path / "one", **ready), tmp_path / "teacher.pth")
    with pytest.raises(
        TeacherError, match=r"learned from other interactions.*may have seen the student's test set"
    ):
        read_teacher(tmp_path / "teacher.pth", build(tmp_path / "two", **ready).train)
    (tmp_path / "moved").mkdir()
    (tmp_path / "one/tiny").rename(tmp_path / "moved/tiny")
    read_teacher(tmp_path / "teacher.pth", build(tmp_path / "moved", **ready).train)


def test_features_that_only_the_teacher_reads(tmp_path: Path) -> None:
    """Which columns are numbers, RecBole is told by a key that is none of its dataset's."""
    write_dataset(tmp_path)
    write_atomic_file(
        tmp_path / "tiny/tiny.item",
        ["item_id:token", "price:float"],
        [(f"i{i}", i) for i in range(60)],
    )
    common: dict[str, Any] = {
        "load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "price"]}
    }
    common["eval_args"] = {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "group_by": "user",
        "order": "RO",
        "mode": "full",
    }
    teacher = build(tmp_path, "FM", numerical_features=["price"], **common)
    save_untrained(teacher, tmp_path / "fm.pth", build_model(teacher, 1))
    read = read_teacher(tmp_path / "fm.pth", build(tmp_path, "NeuMF", **common).train)
    own = read_teacher(tmp_path / "fm.pth", teacher.train)
    users = torch.tensor([1, 5])
    torch.testing.assert_close(read.score_all(users), own.score_all(users))


def test_a_setting_that_would_be_run_is_refused(
    folder: Path, tmp_path: Path, student: Bundle
) -> None:
    """KD_DAGFM hands the name of its network to ``eval``."""
    file = with_settings(
        folder / "BPR.pth", tmp_path / "x.pth", model="KD_DAGFM", teacher="print('run') or CrossNet"
    )
    with pytest.raises(TeacherError, match=r"names a network .*which KD_DAGFM does not have"):
        read_teacher(file, student.train)


def test_building_a_teacher_leaves_the_switches_of_cudnn(folder: Path, student: Bundle) -> None:
    for switches in ((True, False), (False, True)):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = switches
        read_teacher(folder / "BPR.pth", student.train).model  # noqa: B018
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == switches


def test_other_features_are_another_teacher(tmp_path: Path) -> None:
    """The same weights read other side information; a sequential one another order."""
    write_dataset(tmp_path)
    columns = ["item_id:token", "price:float"]
    keys = []
    for price in (1, 1, 2):
        write_atomic_file(
            tmp_path / "tiny/tiny.item", columns, [(f"i{i}", price * i) for i in range(1, 31)]
        )
        bundle = build(
            tmp_path, "FM", load_col={"inter": ["user_id", "item_id"], "item": ["item_id", "price"]}
        )
        torch.manual_seed(0)
        save_untrained(bundle, tmp_path / "fm.pth", build_model(bundle, 1))
        keys.append(read_teacher(tmp_path / "fm.pth", bundle.train).fingerprint)
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("path", ["BPR.pth", "CKE.pth"])
def test_random_streams_are_left_alone(folder: Path, student: Bundle, path: str) -> None:
    """A draw between `init_seed` and the data or the model would change the split or the model."""
    if path == "CKE.pth":  # its data have to be built again
        save_untrained(build(folder, "CKE", **SMALL), folder / path)
    before = random_states()
    teacher = read_teacher(folder / path, student.train)
    assert random_states() == before
    teacher.model  # noqa: B018
    assert random_states() == before
    teacher.score_all(torch.tensor([1]))
    teacher.factors()
    assert random_states() == before


@pytest.mark.parametrize("name", ["MacridVAE", "ADMMSLIM", "Random"])
def test_teachers_that_draw_in_evaluation_leave_them_alone_too(
    folder: Path, student: Bundle, tmp_path: Path, name: str
) -> None:
    settings: dict[str, Any] = (
        {"train_neg_sample_args": None, "kfac": 2, **SMALL} if name == "MacridVAE" else {}
    )
    save_untrained(build(folder, name, **settings), tmp_path / "x.pth")
    before = random_states()
    teacher = read_teacher(tmp_path / "x.pth", student.train)
    assert teacher.factors() is None
    teacher.score_all(torch.tensor([1, 2]))
    assert random_states() == before


def test_command_line_does_not_reach_the_teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["run_recbole_kd.py", "--embedding_size=7", "--seed=2020", "--model=NeuMF"]
    )
    student = build(folder, "BPR")
    assert student.config["embedding_size"] == 7
    teacher = read_teacher(folder / "BPR.pth", student.train)
    assert type(teacher.model).__name__ == "BPR"
    assert teacher.model.user_embedding.weight.shape == (41, 8)


def test_the_students_device_and_paths_are_used(
    folder: Path, student: Bundle, tmp_path: Path
) -> None:
    path = with_settings(
        folder / "BPR.pth",
        tmp_path / "x.pth",
        device=torch.device("cuda", 3),
        data_path="/gone",
        checkpoint_dir="/gone",
    )
    teacher = read_teacher(path, student.train)
    assert teacher.model.device == torch.device("cpu")
    assert teacher.fingerprint == read_teacher(folder / "BPR.pth", student.train).fingerprint


@pytest.mark.parametrize("name", ["Nothing", "../evil", ""])
def test_unknown_model_is_refused(folder: Path, student: Bundle, tmp_path: Path, name: str) -> None:
    path = with_settings(folder / "BPR.pth", tmp_path / "x.pth", model=name)
    with pytest.raises(
        TeacherError, match=r"which this RecBole does not know|is no RecBole Config"
    ):
        read_teacher(path, student.train)


@pytest.mark.parametrize("config", [{"model": "BPR"}, None, "BPR"])
def test_config_of_another_kind_is_refused(
    folder: Path, student: Bundle, tmp_path: Path, config: Any
) -> None:
    path = changed(
        folder / "BPR.pth", tmp_path / "x.pth", lambda content: content.update(config=config)
    )
    with pytest.raises(TeacherError, match=r"\[config\] is no RecBole Config"):
        read_teacher(path, student.train)


def test_model_that_is_no_torch_model_is_refused(
    folder: Path, student: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = type("LightGBM", (), {"type": ModelType.DECISIONTREE})
    monkeypatch.setattr("recbole_rcekd.teachers.checkpoint_teacher.get_model", lambda name: trees)
    with pytest.raises(
        ScoringError, match=r"^LightGBM is a DECISIONTREE model, which RecBole trains and scores"
    ):
        read_teacher(folder / "BPR.pth", student.train)


@pytest.mark.parametrize("reason", ["no such file", "not trusted"])
def test_file_that_cannot_be_read(
    folder: Path, student: Bundle, tmp_path: Path, reason: str
) -> None:
    path = tmp_path / "x.pth"
    if reason == "not trusted":
        changed(folder / "BPR.pth", path, lambda content: content.update(extra=Path("x")))
        assert read_teacher(path, student.train, trust=True).fingerprint
    with pytest.raises(TeacherError, match=r"There is no checkpoint|teacher_trust: True"):
        read_teacher(path, student.train)
    with pytest.raises(KDError):
        read_teacher(str(path), student.train)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "NeuMF",
            {"use_pretrain": True, "mf_pretrain_path": "gone.pth", "mlp_pretrain_path": "gone.pth"},
        ),
        ("ConvNCF", {"train_method": "after_pretrain", "pre_model_path": "gone.pth"}),
        ("NAIS", {"pretrain_path": "gone.pth"}),
        ("RaCT", {"train_stage": "finetune", "pre_model_path": "gone.pth"}),
    ],
)
def test_files_that_the_teacher_started_from_are_not_needed(
    folder: Path, student: Bundle, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    """Nor opened: RecBole would run whatever is pickled in them."""
    extra: dict[str, Any] = (
        {"train_neg_sample_args": None, "mlp_hidden_size": [8]} if name == "RaCT" else {}
    )
    save_untrained(build(folder, name, **extra), tmp_path / "x.pth")
    path = with_settings(tmp_path / "x.pth", tmp_path / "y.pth", **settings)
    teacher = read_teacher(path, student.train)
    own = torch.load(tmp_path / "x.pth", weights_only=False)["state_dict"]
    assert own.keys() == teacher.model.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in teacher.model.state_dict().items())


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def test_pickled_data_that_the_checkpoint_names_are_not_opened(
    folder: Path, student: Bundle, tmp_path: Path
) -> None:
    evil, sentinel = tmp_path / "evil", tmp_path / "sentinel"
    evil.mkdir()
    for name in ("tiny-KnowledgeBasedDataset.pth", "tiny-Dataset.pth", "data.pth"):
        (evil / name).write_bytes(pickle.dumps(Touch(sentinel)))
    save_untrained(build(folder, "CKE", **SMALL), tmp_path / "x.pth")
    settings = {
        "dataset_save_path": str(evil / "data.pth"),
        "dataloaders_save_path": str(evil / "data.pth"),
    }
    path = with_settings(
        tmp_path / "x.pth",
        tmp_path / "y.pth",
        checkpoint_dir=str(evil),
        save_dataset=True,
        **settings,
    )
    read_teacher(path, student.train).scorer  # noqa: B018
    assert not sentinel.exists()
    pickle.loads((evil / "data.pth").read_bytes())
    assert sentinel.exists()


def test_fingerprint_says_what_decides_the_scores(
    folder: Path, student: Bundle, tmp_path: Path
) -> None:
    def fingerprint(path: Path, bundle: Bundle = student) -> str:
        return read_teacher(path, bundle.train).fingerprint

    first = fingerprint(folder / "BPR.pth")
    shutil.copy(folder / "BPR.pth", tmp_path / "renamed.pth")
    elsewhere = build(folder, "BPR", checkpoint_dir=str(tmp_path), embedding_size=3)
    shuffled = changed(
        folder / "BPR.pth",
        tmp_path / "shuffled.pth",
        lambda c: c.update(state_dict=dict(reversed(list(c["state_dict"].items())))),
    )
    same = {
        fingerprint(tmp_path / "renamed.pth"),
        fingerprint(folder / "BPR.pth", elsewhere),
        fingerprint(
            with_settings(
                folder / "BPR.pth", tmp_path / "x.pth", gpu_id="3", worker=2, checkpoint_dir="/x"
            )
        ),
        fingerprint(shuffled),
    }
    assert same == {first}

    def nudge(content: dict[str, Any]) -> None:
        content["state_dict"]["item_embedding.weight"][60, 7] += 1e-6

    time_order = build(folder, "BPR", **IN_TIME)
    save_untrained(build(folder, "BPR", **SMALL, **IN_TIME), tmp_path / "time.pth")
    save_untrained(
        build(folder, "BPR", rm_dup_inter="first", **SMALL, **IN_TIME), tmp_path / "ids.pth"
    )
    others = [
        first,
        fingerprint(changed(folder / "BPR.pth", tmp_path / "nudged.pth", nudge)),
        fingerprint(with_settings(folder / "BPR.pth", tmp_path / "setting.pth", reg_weight=0.5)),
        fingerprint(tmp_path / "time.pth", time_order),
        fingerprint(tmp_path / "ids.pth", time_order),
    ]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("name", ["EASE", "ItemKNN", "Pop", "SLIMElastic"])
def test_fingerprint_covers_weights_outside_the_state_dict(
    folder: Path, student: Bundle, tmp_path: Path, name: str
) -> None:
    train_and_save(build(folder, name, epochs=1), tmp_path / "x.pth")

    def nudge(content: dict[str, Any]) -> None:
        other = content["other_parameter"]
        key = {
            "EASE": "item_similarity",
            "ItemKNN": "pred_mat",
            "Pop": "item_cnt",
            "SLIMElastic": "item_similarity",
        }
        other[key[name]] = other[key[name]] * 2

    paths = [tmp_path / "x.pth", changed(tmp_path / "x.pth", tmp_path / "y.pth", nudge)]
    prints = [read_teacher(path, student.train).fingerprint for path in paths]
    assert prints[0] != prints[1]
    assert prints[0] == read_teacher(paths[0], student.train).fingerprint
    assert (
        read_teacher(paths[0], student.train).score_all(torch.tensor([1, 2])).isfinite().sum()
        == 120
    )


def test_fingerprint_ignores_what_evaluation_left(
    folder: Path, student: Bundle, tmp_path: Path
) -> None:
    train_and_save(build(folder, "LightGCN", **SMALL), tmp_path / "x.pth")
    assert (
        torch.load(tmp_path / "x.pth", weights_only=False)["other_parameter"]["restore_user_e"]
        is not None
    )
    path = changed(
        tmp_path / "x.pth", tmp_path / "y.pth", lambda content: content.pop("other_parameter")
    )
    teachers = [read_teacher(p, student.train) for p in (tmp_path / "x.pth", path)]
    assert teachers[0].fingerprint == teachers[1].fingerprint
    users = torch.arange(41)
    torch.testing.assert_close(teachers[0].score_all(users), teachers[1].score_all(users))


def test_fingerprint_is_the_same_in_another_process(folder: Path, student: Bundle) -> None:
    code = (
        "import sys; sys.argv = ['x']\n"
        "from pathlib import Path\n"
        "from tests.helpers import build\n"
        "from recbole_rcekd.teachers.checkpoint_teacher import read_teacher\n"
        f"folder = Path({str(folder)!r})\n"
        "print(read_teacher(folder / 'BPR.pth', build(folder, 'BPR').train).fingerprint)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "11"},
    )
    assert result.stdout.split()[-1] == read_teacher(folder / "BPR.pth", student.train).fingerprint


def test_training_interactions_and_their_hash(folder: Path, student: Bundle) -> None:
    data = student.train._dataset
    seen = training_interactions(data)
    users, items = np.asarray(data.inter_feat["user_id"]), np.asarray(data.inter_feat["item_id"])
    assert len(users) < len(block_pairs())  # not what validation and test hold back
    for user in range(data.user_num):
        own = seen.ids[seen.starts[user] : seen.starts[user + 1]].tolist()
        assert own == sorted(set(items[users == user].tolist()))
    assert split_hash(data) == split_hash(build(folder, "LightGCN").train._dataset)
    assert split_hash(data) != split_hash(build(folder, "BPR", seed=7).train._dataset)
