"""Teachers of one kind and students of another: from files on disk to a result, and the scores."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd import KDError, load_teacher, run_recbole_kd
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.data.contexts import ROW_FIELD
from recbole_rcekd.data.sequence_dataset import create_dataset
from recbole_rcekd.data.sequences import training_pairs
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import CheckpointTeacher
from recbole_rcekd.teachers.score_cache import open_teacher_scores
from recbole_rcekd.teachers.score_tables import DenseScores, FactorScores, Scores
from recbole_rcekd.training.sequence_candidates import row_teacher_of
from recbole_rcekd.training.sequence_distiller import SequenceDistiller
from tests.helpers import (
    Bundle,
    block_pairs,
    build_config,
    build_model,
    save_untrained,
    write_atomic_file,
)

# isort: split
from recbole.data import data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
N_USERS, N_ITEMS, N_OF_EACH, LENGTH = 16, 24, 10, 5
HEADER = ("user_id:token", "item_id:token", "timestamp:float")
LEAVE_ONE_OUT: dict[str, Any] = {"split": {"LS": "valid_and_test"}}
RATIO: dict[str, Any] = {"split": {"RS": [0.6, 0.2, 0.2]}}
LISTS = {"rce_top_k": 5, "rce_samples": 5, "rce_pool": 15, "kd_diagnostic_users": 4}
SAS = {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "SASRec": SAS,
    "BERT4Rec": SAS,
    "CORE": {"embedding_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1},
    "GRU4Rec": {"embedding_size": 8, "hidden_size": 8, "num_layers": 1},
    "HSTU": {
        "hidden_size": 8,
        "attention_dim": 4,
        "linear_dim": 4,
        "n_layers": 1,
        "n_negatives": 8,
    },
    "FPMC": {"embedding_size": 4},
    "BPR": {"embedding_size": 4},
    "LightGCN": {"embedding_size": 4, "n_layers": 1},
    "NeuMF": {"mf_embedding_size": 4, "mlp_embedding_size": 4, "mlp_hidden_size": [4]},
    "MultiVAE": {"mlp_hidden_size": [8], "latent_dimension": 4},
    "ItemKNN": {"k": 5},
}
SEQUENTIAL = {"SASRec", "BERT4Rec", "CORE", "GRU4Rec", "HSTU", "FPMC"}
WHOLE_CATALOGUE = {"SASRec", "BERT4Rec", "CORE", "GRU4Rec", "HSTU", "MultiVAE"}


def events() -> list[tuple[str, str, int]]:
    """Latest first, so that `rm_dup_inter`, which sorts by time, gives other ids."""
    pairs = block_pairs(N_USERS, N_ITEMS, 4, N_OF_EACH)
    return [(user, item, 1000 - n) for n, (user, item) in enumerate(pairs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data `tiny`, whole and as a ready split.

    In the split, three interactions of each user are validation and test.
    """
    folder = tmp_path_factory.mktemp("pairs")
    write_atomic_file(folder / "tiny" / "tiny.inter", HEADER, events())
    of_user: dict[str, list[tuple[str, str, int]]] = {}
    for event in reversed(events()):
        of_user.setdefault(event[0], []).append(event)
    for part, cut in (
        ("train", slice(None, -3)),
        ("valid", slice(-3, -2)),
        ("test", slice(-2, None)),
    ):
        rows = [event for own in of_user.values() for event in own[cut]]
        write_atomic_file(folder / "tiny" / f"tiny.{part}.inter", HEADER, rows)
    return folder


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings_of(model: str, split: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "eval_args": {"order": "TO", "group_by": "user", "mode": "full", **split},
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "epochs": 1,
        **LISTS,
        **MODELS[model],
    }
    if model in WHOLE_CATALOGUE:
        settings["train_neg_sample_args"] = None
    return {**settings, **more}


def run(
    folder: Path, teacher: str | None, model: str, split: dict[str, Any], **more: Any
) -> dict[str, Any]:
    given = {
        **{
            "data_path": str(folder),
            "use_gpu": False,
            "state": "ERROR",
            "show_progress": False,
            "seed": 2020,
        },
        **{
            "train_batch_size": 128,
            "metrics": ["NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "teacher_epochs": 1,
        },
        **settings_of(model, split),
        **{f"teacher_{key}": value for key, value in MODELS.get(teacher or "", {}).items()},
        **more,
    }
    loss, out = given.pop("kd_loss", "rce"), given.pop("out", "out")
    return run_recbole_kd(
        model, "tiny", config_dict=given, teacher=teacher, kd_loss=loss, output_dir=out
    )


# --- every kind with every other ------------------------------------------------------------------

INTERACTIONS = {"kd_sequence_split": "interactions"}
READY = {"benchmark_filename": ["train", "valid", "test"]}
BY_PAIRS = {
    "loss_type": "BPR",
    "train_neg_sample_args": {
        "distribution": "uniform",
        "sample_num": 1,
        "alpha": 1.0,
        "dynamic": False,
    },
}


@pytest.mark.parametrize(
    ("teacher", "student", "split", "settings"),
    [
        # A sequential teacher of users.
        ("SASRec", "BPR", LEAVE_ONE_OUT, {}),
        ("SASRec", "LightGCN", RATIO, {}),
        ("SASRec", "NeuMF", RATIO, READY),
        ("HSTU", "BPR", RATIO, {}),
        # A general teacher of sequences.
        ("BPR", "GRU4Rec", LEAVE_ONE_OUT, {}),
        ("BPR", "GRU4Rec", RATIO, INTERACTIONS),
        ("ItemKNN", "GRU4Rec", RATIO, READY),
        # Both sequential.
        ("SASRec", "HSTU", LEAVE_ONE_OUT, {}),
        ("HSTU", "GRU4Rec", RATIO, {}),
        ("HSTU", "GRU4Rec", RATIO, INTERACTIONS),
        ("GRU4Rec", "GRU4Rec", RATIO, {**BY_PAIRS, "teacher_MAX_ITEM_LIST_LENGTH": 3}),
        # Both general, one of them an auto-encoder.
        ("MultiVAE", "BPR", LEAVE_ONE_OUT, {}),
        ("BPR", "MultiVAE", RATIO, {}),
    ],
)
def test_any_kind_teaches_any_other(
    folder: Path, teacher: str, student: str, split: dict[str, Any], settings: dict[str, Any]
) -> None:
    result = run(folder, teacher, student, split, **settings)
    assert result["teacher"]["model"] == teacher
    assert 0 <= result["teacher"]["test_result"]["ndcg@10"] <= 1
    with Path("out/rce-seed2020/history.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["kd_loss"]) < 100
    assert 0 <= float(row["ndcg@10_to_teacher"]) <= 1


@pytest.mark.parametrize(("teacher", "student"), [("BPR", "GRU4Rec"), ("SASRec", "GRU4Rec")])
def test_the_other_losses_teach_sequences(folder: Path, teacher: str, student: str) -> None:
    lists = {
        "rrd_top_k": 3,
        "rrd_rest": 4,
        "rrd_pool": 8,
        "cd_pool": 8,
        "cd_items": 4,
        "ce_top_k": 5,
    }
    result = run(
        folder, teacher, student, LEAVE_ONE_OUT, kd_loss="ce,fce,cd,rrd", fce_target="all", **lists
    )
    for each in result["runs"]:
        with Path(f"out/{each['loss']}-seed2020/history.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert 0 < float(row["kd_loss"]) < 100


def test_a_control_of_sequences_hears_nothing_of_the_teacher(folder: Path) -> None:
    """A general teacher's would hide items from the normaliser."""
    results = []
    for teacher in ("BPR", None):
        (each,) = run(
            folder, teacher, "GRU4Rec", LEAVE_ONE_OUT, kd_loss="softmax", out=f"out-{teacher}"
        )["runs"]
        state = torch.load(each["checkpoint"], weights_only=False)["state_dict"]
        results.append(torch.cat([table.flatten() for table in state.values()]))
    assert torch.equal(*results)


def test_rows_are_split_otherwise_than_interactions(folder: Path) -> None:
    with pytest.raises(
        TeacherError,
        match=r"learned from other interactions .* set kd_sequence_split: interactions",
    ):
        run(folder, "BPR", "GRU4Rec", RATIO)


@pytest.mark.parametrize("target", ["all", "teacher"])
def test_what_is_hidden_from_a_row_is_no_negative_either(
    folder: Path, tmp_path: Path, target: str
) -> None:
    """CE over the catalogue: of a user's training items, only the row's target is not masked.

    That holds for teacher and student.
    """
    student = built(folder, "GRU4Rec")
    dataset, model = student.train._dataset, build_model(student).eval()
    saved(built(folder, "BPR"), tmp_path / "x.pth")
    _, scores = taught(tmp_path / "x.pth", student, tmp_path)
    loss: Any = LOSSES["fce"](
        LOSSES["fce"].settings_type.from_mapping({"fce_target": target, "fce_top_k": 4})
    )
    scorer = ModelScorer(model, dataset, trainable=True)
    distiller = SequenceDistiller(
        scorer, row_teacher_of(dataset, scores), loss, KDSettings(kd_diagnostic_users=0), dataset, 0
    )
    rows = torch.arange(0, len(dataset), 3)
    batch = dataset[rows]
    batch.update(Interaction({ROW_FIELD: rows}))
    found = distiller.step(batch, [])
    users, items = training_pairs(dataset)
    with torch.no_grad():
        says = model.full_sort_predict(batch)
    expected = []
    for row, (user, item) in enumerate(
        zip(batch["user_id"].tolist(), batch["item_id"].tolist(), strict=True)
    ):
        free = sorted(({*range(1, N_ITEMS + 1)} - set(items[users == user].tolist())) | {item})
        teacher = scores.score_all(torch.tensor([user]))[0]
        best = sorted(free, key=lambda i: -float(teacher[i]))[: 4 if target == "teacher" else None]
        log_p = dict(zip(free, says[row][free].log_softmax(0), strict=True))
        expected.append(
            -sum(w * log_p[i] for w, i in zip(teacher[best].softmax(0), best, strict=True))
        )
    torch.testing.assert_close(found.detach(), torch.stack(expected).mean())


def test_a_sequential_teacher_wants_the_order_of_time(folder: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"SASRec learns sequences, but \[eval_args\] has order 'RO'.*set order: TO",
    ):
        run(folder, "SASRec", "BPR", {**RATIO, "order": "RO"})


RRD_LISTS = {"rrd_top_k": 3, "rrd_rest": 4, "rrd_pool": 8}


@pytest.mark.parametrize(
    ("student", "more", "says"),
    [
        (
            "GRU4Rec",
            {"kd_loss": "scratch,rce,ftd"},
            r"ftd learns from the vectors of users, but GRU4Rec has none",
        ),
        (
            "GRU4Rec",
            {"kd_loss": "rrd", "rrd_item_weight": 1.0, **RRD_LISTS},
            r"\[rrd_item_weight\] teaches which users .* GRU4Rec scores sequences",
        ),
        (
            "NeuMF",
            {"kd_loss": "fitnet"},
            r"fitnet learns from vectors, but NeuMF's scores are no product",
        ),
    ],
)
def test_a_student_that_cannot_learn_so_is_refused_before_the_teacher_is_trained(
    folder: Path, student: str, more: dict[str, Any], says: str
) -> None:
    with pytest.raises(KDError, match=says):
        run(folder, "BPR", student, LEAVE_ONE_OUT, **more)
    assert not list(Path("saved").glob("teacher-*"))


# --- what is taught is what the teacher's model says ----------------------------------------------


def built(folder: Path, model: str, split: dict[str, Any] = LEAVE_ONE_OUT, **more: Any) -> Bundle:
    config = build_config(folder, model, **settings_of(model, split, **more))
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    return Bundle(config, dataset, *data_preparation(config, dataset))


def saved(bundle: Bundle, path: Path) -> Any:
    """The checkpoint of a model with drawn weights, and the model."""
    return save_untrained(bundle, path, build_model(bundle, seed=3)).eval()


def taught(
    path: Path, student: Bundle, tmp_path: Path, **settings: Any
) -> tuple[Teacher, FactorScores | DenseScores]:
    teacher = load_teacher(path, student.train)
    assert isinstance(teacher, Teacher)
    return teacher, open_teacher_scores(
        teacher, KDSettings(kd_cache_dir=str(tmp_path / "cache"), **settings)
    )


def names(bundle: Bundle, field: str) -> list[str]:
    return [str(token) for token in bundle.dataset.field2id_token[field]]


def in_ids_of(student: Bundle, own: Bundle, rows: Tensor) -> Tensor:
    """Full rows of the teacher, brought to the student's item ids by token; −inf for padding."""
    place = [own.dataset.field2token_id["item_id"][token] for token in names(student, "item_id")]
    return rows[:, place].index_fill(1, torch.tensor([0]), -torch.inf)


def sequence_input(own: Bundle, tokens: list[list[str]], width: int) -> Interaction:
    """An Interaction by hand: the last ``width`` items of each sequence, zeros behind."""
    ids = own.dataset.field2token_id["item_id"]
    kept = [[ids[token] for token in row[-width:]] for row in tokens]
    lists = torch.tensor([row + [0] * (width - len(row)) for row in kept])
    return Interaction(
        {"item_id_list": lists, "item_length": torch.tensor([len(row) for row in kept])}
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


OTHER_IDS: dict[str, Any] = {"rm_dup_inter": "first"}


@pytest.mark.parametrize(
    ("model", "kind", "more"),
    [
        ("SASRec", FactorScores, {}),
        ("SASRec", FactorScores, OTHER_IDS),
        ("GRU4Rec", FactorScores, {"MAX_ITEM_LIST_LENGTH": 3}),
        ("BERT4Rec", FactorScores, {}),
        ("CORE", FactorScores, {}),
    ],
)
def test_a_user_is_asked_with_the_whole_training_sequence(
    folder: Path, tmp_path: Path, model: str, kind: type[Scores], more: dict[str, Any]
) -> None:
    student, own = built(folder, "BPR"), built(folder, model, **more)
    with torch.no_grad():
        network = saved(own, tmp_path / "x.pth")
        teacher, scores = taught(tmp_path / "x.pth", student, tmp_path)
        assert type(scores) is kind
        sequences: dict[str, list[tuple[int, str]]] = {}
        for user, item, time in events():
            sequences.setdefault(user, []).append((time, item))
        # In order of time, without the two that are held back.
        training = [
            [item for _, item in sorted(sequences[u])[:-2]] for u in names(student, "user_id")[1:]
        ]
        rows = network.full_sort_predict(
            sequence_input(own, training, int(own.config["MAX_ITEM_LIST_LENGTH"]))
        )
    users = torch.arange(1, N_USERS + 1)
    expected = in_ids_of(student, own, rows.view(N_USERS, -1)[:, : N_ITEMS + 1])
    assert_close(scores.score_all(users), expected)
    assert_close(teacher.score_rows(Interaction({"user_id": users})), expected)


@pytest.mark.parametrize(
    ("model", "kind", "more"),
    [
        ("SASRec", FactorScores, {}),
        ("SASRec", FactorScores, OTHER_IDS),
        ("GRU4Rec", FactorScores, {"MAX_ITEM_LIST_LENGTH": 3}),
        ("FPMC", DenseScores, {}),
        ("FPMC", DenseScores, OTHER_IDS),
    ],
)
def test_a_row_is_asked_with_its_own_sequence(
    folder: Path, tmp_path: Path, model: str, kind: type[Scores], more: dict[str, Any]
) -> None:
    student, own = built(folder, "GRU4Rec"), built(folder, model, **more)
    if more == OTHER_IDS:
        assert names(student, "item_id") != names(own, "item_id")
    features, tokens = student.train._dataset.inter_feat, names(student, "item_id")
    with torch.no_grad():
        network = saved(own, tmp_path / "x.pth")
        teacher, scores = taught(tmp_path / "x.pth", student, tmp_path)
        assert type(scores) is kind
        histories = [
            [tokens[item] for item in row if item] for row in features["item_id_list"].tolist()
        ]
        asked = sequence_input(own, histories, int(own.config["MAX_ITEM_LIST_LENGTH"]))
        ids = own.dataset.field2token_id["user_id"]
        users = [ids[names(student, "user_id")[user]] for user in features["user_id"].tolist()]
        asked.update(Interaction({"user_id": torch.tensor(users)}))
        rows = network.full_sort_predict(asked)
    expected = in_ids_of(student, own, rows.view(len(features), -1))
    assert (scores.n_contexts, teacher.scores_rows) == (len(features), True)
    assert_close(scores.score_all(torch.arange(len(features))), expected)
    assert_close(teacher.score_rows(features), expected)


@pytest.mark.parametrize("model", ["GRU4Rec", "FPMC"])
def test_rows_are_scored_once(
    folder: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = built(folder, "SASRec")
    saved(built(folder, model), tmp_path / "x.pth")
    teacher, scores = taught(tmp_path / "x.pth", student, tmp_path)
    every = torch.arange(scores.n_contexts)
    with monkeypatch.context() as patch:
        patch.setattr(
            CheckpointTeacher, "model", property(lambda self: pytest.fail("the model was built"))
        )
        again, found = taught(tmp_path / "x.pth", built(folder, "SASRec"), tmp_path)
        assert torch.equal(found.score_all(every), scores.score_all(every))
        assert again.fingerprint == teacher.fingerprint
    marks = {teacher.fingerprint}
    for other in (
        built(folder, "SASRec", MAX_ITEM_LIST_LENGTH=4),  # other sequences in the rows
        built(folder, "HSTU"),  # fewer rows
        built(folder, "SASRec", **OTHER_IDS),
        built(folder, "BPR"),  # users
    ):
        marks.add(load_teacher(tmp_path / "x.pth", other.train).fingerprint)
    assert len(marks) == 5
