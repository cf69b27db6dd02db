"""VBPR: scores and loss by hand, features in files, checkpoints, and as the teacher of a BPR."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.models.vbpr import VBPR, prepare_features
from recbole_rcekd.quick_start import run_recbole_kd
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from tests.helpers import (
    N_ITEMS,
    Bundle,
    build,
    build_model,
    save_untrained,
    write_atomic_file,
    write_dataset,
)

# isort: split
from recbole.data.interaction import Interaction
from recbole.quick_start import load_data_and_model
from recbole.utils import get_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
TEXT, IMAGE = 5, 3
WITHOUT_TEXT = ("i4", "i9")
FEATURES: dict[str, Any] = {
    "additional_feat_suffix": ["text", "image"],
    "alias_of_item_id": ["tid", "vid"],
    "preload_weight": {"tid": "text_vec", "vid": "image_vec"},
    "load_col": {
        "inter": ["user_id", "item_id"],
        "text": ["tid", "text_vec"],
        "image": ["vid", "image_vec"],
    },
}
SIZES: dict[str, Any] = {"embedding_size": 4, "feature_embedding_size": 6}


def vectors(size: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    # The order is not that of the ids.
    return {f"i{item}": draw.normal(2.0, 1.0, size).round(4) for item in draw.permutation(N_ITEMS)}


def write_vectors(
    folder: Path, kind: str, id_field: str, rows: dict[str, np.ndarray[Any, Any]]
) -> None:
    write_atomic_file(
        folder / "tiny" / f"tiny.{kind}",
        (f"{id_field}:token", f"{kind}_vec:float_seq"),
        [(token, " ".join(map(str, vector))) for token, vector in rows.items()],
    )


def write_all(folder: Path) -> Path:
    write_dataset(folder)
    text = {
        token: vector for token, vector in vectors(TEXT, 1).items() if token not in WITHOUT_TEXT
    }
    write_vectors(folder, "text", "tid", text)
    write_vectors(folder, "image", "vid", vectors(IMAGE, 2))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("vbpr"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytest"])
        return build(folder, "VBPR", **FEATURES, **SIZES)


@pytest.fixture
def model(bundle: Bundle) -> Any:
    return build_model(bundle)


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])


def slow_features(bundle: Bundle) -> np.ndarray[Any, Any]:
    """The vectors in the files by item id, less the mean of those given, of length 1, joined."""
    table = np.zeros((bundle.dataset.item_num, TEXT + IMAGE))
    text = {
        token: vector for token, vector in vectors(TEXT, 1).items() if token not in WITHOUT_TEXT
    }
    for start, given in ((0, text), (TEXT, vectors(IMAGE, 2))):
        mean = sum(given.values()) / len(given)
        for token, vector in given.items():
            centred = vector - mean
            row = bundle.dataset.field2token_id["item_id"][token]
            table[row, start : start + len(vector)] = centred / math.sqrt(
                sum(x * x for x in centred)
            )
    return table


def slow_score(model: Any, features: np.ndarray[Any, Any], user: int, item: int) -> float:
    """Equations 4 and 7 of the paper, term by term."""
    weights = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    score = float(weights["item_bias.weight"][item, 0])
    for gamma_u, gamma_i in zip(
        weights["user_embedding.weight"][user], weights["item_embedding.weight"][item], strict=True
    ):
        score += gamma_u * gamma_i
    for theta, row in zip(
        weights["user_taste.weight"][user], weights["projection.weight"], strict=True
    ):
        score += theta * sum(e * f for e, f in zip(row, features[item], strict=True))
    score += float(
        sum(b * f for b, f in zip(weights["feature_bias.weight"][0], features[item], strict=True))
    )
    return score


def user_batch(*users: int) -> Any:
    return Interaction({"user_id": torch.tensor(users)})


# --- scores and loss ------------------------------------------------------------------------------


def test_recbole_knows_it() -> None:
    assert get_model("VBPR") is VBPR


def test_features_are_those_of_the_files(bundle: Bundle, model: Any) -> None:
    assert_allclose(model.features.numpy(), slow_features(bundle), atol=1e-6)
    ids = bundle.dataset.field2token_id["item_id"]
    assert not model.features[0].any()
    for token in WITHOUT_TEXT:
        assert not model.features[ids[token], :TEXT].any()
        assert model.features[ids[token], TEXT:].any()


def test_preparing_features_by_hand() -> None:
    # The mean of the two vectors that are not zero is (4, 1).
    given = np.array([[0, 0], [1, 5], [0, 0], [7, -3]])
    root = 5  # of (−3)² + 4²
    expected = np.array([[0, 0], [-3 / root, 4 / root], [0, 0], [3 / root, -4 / root]])
    assert_allclose(prepare_features(given), expected, rtol=1e-6)
    # The two given vectors are equal.
    assert_allclose(prepare_features(np.array([[0.0], [2.0], [2.0]])), np.zeros((3, 1)))
    assert_allclose(prepare_features(np.zeros((2, 3))), np.zeros((2, 3)))


def test_scores_against_a_slow_derivation(bundle: Bundle, model: Any) -> None:
    features, users = slow_features(bundle), (1, 7, 40)
    expected = np.array(
        [[slow_score(model, features, u, i) for i in range(bundle.dataset.item_num)] for u in users]
    )
    model.eval()
    with torch.no_grad():
        assert_allclose(
            model.full_sort_predict(user_batch(*users)).numpy(), expected, rtol=1e-4, atol=1e-6
        )
        pairs = Interaction(
            {"user_id": torch.tensor([7, 40, 1]), "item_id": torch.tensor([3, 0, 60])}
        )
        assert_allclose(model.predict(pairs), expected[[1, 2, 0], [3, 0, 60]], rtol=1e-4, atol=1e-6)


def test_loss_by_arithmetic(bundle: Bundle, model: Any) -> None:
    triples = [(1, 5, 9), (2, 5, 5), (2, 60, 5)]
    features = slow_features(bundle)
    total = 0.0
    for user, positive, negative in triples:
        margin = slow_score(model, features, user, positive) - slow_score(
            model, features, user, negative
        )
        total -= math.log(1e-10 + 1 / (1 + math.exp(-margin)))
    users, positives, negatives = torch.tensor(triples).t()
    batch = Interaction({"user_id": users, "item_id": positives, "neg_item_id": negatives})
    assert model.calculate_loss(batch).item() == pytest.approx(total / 3, rel=1e-5)


def test_gradient_reaches_every_parameter_and_not_the_features(bundle: Bundle, model: Any) -> None:
    model.calculate_loss(next(iter(bundle.train))).backward()
    names = {name for name, _ in model.named_parameters()}
    assert names == {
        *("user_embedding.weight", "item_embedding.weight", "user_taste.weight"),
        *("item_bias.weight", "projection.weight", "feature_bias.weight"),
    }
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not model.features.requires_grad


def test_other_features_give_other_scores(model: Any) -> None:
    before = model.full_sort_predict(user_batch(3)).detach()
    model.features[5] *= -1
    after = model.full_sort_predict(user_batch(3)).detach()
    assert (before != after).nonzero()[:, 1].tolist() == [5]


def test_nothing_is_left_over_from_before_a_step(bundle: Bundle, model: Any) -> None:
    with torch.no_grad():
        before = model.full_sort_predict(user_batch(3))
    model.calculate_loss(next(iter(bundle.train))).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 10 * parameter.grad
        after = model.full_sort_predict(user_batch(3))
        items = torch.arange(bundle.dataset.item_num)
        each = model.predict(Interaction({"user_id": torch.full_like(items, 3), "item_id": items}))
    assert not torch.allclose(before, after, atol=1e-3)
    assert_allclose(after[0], each, rtol=1e-4, atol=1e-6)


def test_the_scorer_sees_a_product(bundle: Bundle, model: Any) -> None:
    scorer = ModelScorer(model, bundle.train._dataset, trainable=True)
    assert scorer.kind == "product"
    users = torch.tensor([1, 2, 30])
    with scorer.evaluating():
        full = model.full_sort_predict(user_batch(1, 2, 30))
        assert_allclose(scorer.score_all(users)[:, 1:], full[:, 1:], rtol=1e-5, atol=1e-6)
        rows, table = scorer.operands(users)
    width = SIZES["embedding_size"] + SIZES["feature_embedding_size"] + 1
    assert (rows.shape, table.shape) == ((3, width), (bundle.dataset.item_num, width))


# --- files: checkpoints, and settings that are refused --------------------------------------------


def test_recbole_opens_the_checkpoint(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    saved = save_untrained(bundle, tmp_path / "vbpr.pth")
    _, model, _, train, _, _ = load_data_and_model(str(tmp_path / "vbpr.pth"))
    assert type(model) is VBPR
    with torch.no_grad():
        assert torch.equal(
            model.full_sort_predict(user_batch(1, 2)), saved.full_sort_predict(user_batch(1, 2))
        )
    assert torch.equal(
        train._dataset.inter_feat["item_id"], bundle.train._dataset.inter_feat["item_id"]
    )


def test_a_teacher_keeps_its_features_when_the_file_changes(tmp_path: Path) -> None:
    write_all(tmp_path)
    bundle = build(tmp_path, "VBPR", **FEATURES, **SIZES)
    saved = save_untrained(bundle, tmp_path / "vbpr.pth")
    write_vectors(tmp_path, "text", "tid", vectors(TEXT, 77))
    student = build(tmp_path, "BPR")
    teacher = read_teacher(tmp_path / "vbpr.pth", student.train)
    assert torch.equal(teacher.model.features, saved.features)
    write_vectors(tmp_path, "text", "tid", vectors(TEXT + 1, 77))
    with pytest.raises(TeacherError, match="do not fit a VBPR on this dataset"):
        _ = read_teacher(tmp_path / "vbpr.pth", student.train).model


def test_one_vector_may_be_named_alone_and_may_be_a_number(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    rows = [(f"i{item}", item) for item in range(1, N_ITEMS)]
    write_atomic_file(tmp_path / "tiny" / "tiny.price", ("pid:token", "price:float"), rows)
    price: dict[str, Any] = {
        "additional_feat_suffix": "price",
        "alias_of_item_id": ["pid"],
        "preload_weight": {"pid": "price"},
        "load_col": None,
    }
    model = build_model(build(tmp_path, "VBPR", item_features="price", **price))
    assert model.features.shape == (N_ITEMS + 1, 1)
    # No vector: the padding item and i0; and i30 is the mean.
    assert set(model.features.flatten().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"item_features": []}, r"\[item_features\] is \[\], but must name vectors, as in"),
        ({"item_features": None}, r"\[item_features\] is None, but must name vectors"),
        (
            {"item_features": ["text_vec", "sound_vec"]},
            r"names \[sound_vec\], which is not loaded.*preload_weight: \{tid: sound_vec\}",
        ),
        (
            {"preload_weight": None},
            r"names \[text_vec\], which is not loaded.*alias_of_item_id: \[tid\]",
        ),
        (
            {"load_col": {**FEATURES["load_col"], "text": ["tid"]}},
            r"names \[text_vec\], which is not loaded.*load_col text: \[tid, text_vec\]",
        ),
        (
            {"alias_of_item_id": ["vid"]},
            r"\[text_vec\] are by \[tid\].*write alias_of_item_id: \[tid\]",
        ),
    ],
)
def test_settings_that_are_refused(folder: Path, settings: dict[str, Any], words: str) -> None:
    # Refused before RecBole goes on, where a missing alias is a KeyError.
    with pytest.raises(SettingsError, match=words):
        build(folder, "VBPR", "tiny", **{**FEATURES, **settings})


@pytest.mark.parametrize(("kind", "value"), [("float_seq", "nan 1"), ("token_seq", "word other")])
def test_vectors_that_are_no_numbers_are_refused(tmp_path: Path, kind: str, value: str) -> None:
    write_all(tmp_path)
    rows = [("i1", "1 2"), ("i2", value)]
    write_atomic_file(tmp_path / "tiny" / "tiny.text", ("tid:token", f"text_vec:{kind}"), rows)
    with pytest.raises(
        SettingsError, match=r"\[text_vec\] must be finite numbers: write text_vec:float_seq"
    ):
        build_model(build(tmp_path, "VBPR", **FEATURES))


# --- teaching -------------------------------------------------------------------------------------


def test_it_teaches_a_student_that_knows_no_features(folder: Path, tmp_path: Path) -> None:
    """The student's settings have no features, only the teacher's keys do."""
    settings = {
        **{f"teacher_{key}": value for key, value in {**FEATURES, **SIZES}.items()},
        **{"data_path": str(folder), "use_gpu": False, "state": "ERROR", "show_progress": False},
        **{"teacher_epochs": 2, "epochs": 2, "train_batch_size": 128, "embedding_size": 4},
        **{"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"},
        **{"rce_top_k": 5, "rce_samples": 5, "rce_pool": 20},
    }
    result = run_recbole_kd(
        "BPR", "tiny", config_dict=settings, teacher="VBPR", kd_loss=["scratch", "rce"]
    )
    assert [run["loss"] for run in result["runs"]] == ["scratch", "rce"]
    _, student, dataset, *_ = load_data_and_model(result["runs"][1]["checkpoint"])
    assert type(student).__name__ == "BPR"
    assert dataset.config["additional_feat_suffix"] is None
    _, teacher, *_ = load_data_and_model(result["teacher"]["checkpoint"])
    assert teacher.features.shape == (N_ITEMS + 1, TEXT + IMAGE)
