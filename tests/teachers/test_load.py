"""Score files and several teachers: how they are opened, combined, rescaled and reported."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd import distill_trainer, load_teacher, run_recbole_kd
from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import CheckpointTeacher, read_teacher
from recbole_rcekd.teachers.ensemble import TeacherEnsemble, combined_rows, ensemble
from recbole_rcekd.teachers.listed_scores import ListedScores
from recbole_rcekd.teachers.load import source_list
from recbole_rcekd.teachers.rescale import RescaledScores, rescaled
from recbole_rcekd.teachers.score_file import ScoreFileTeacher
from recbole_rcekd.teachers.score_tables import DenseScores, FactorScores
from recbole_rcekd.training.diagnostics import distance_to_teacher
from recbole_rcekd.training.user_distiller import UserDistiller
from tests.helpers import Bundle, block_pairs, build, build_model, save_untrained, write_atomic_file
from tests.tables import seen_of

# isort: split
from recbole.data.interaction import Interaction

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
N_USERS, N_ITEMS = 16, 24
PAIRS = block_pairs(N_USERS, N_ITEMS, 4, 8)
IN_TIME: dict[str, Any] = {
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "group_by": "user",
        "order": "TO",
        "mode": "full",
    },
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "embedding_size": 4,
    "MAX_ITEM_LIST_LENGTH": 5,
}
SEQUENTIAL: dict[str, Any] = {
    "train_neg_sample_args": None,
    "hidden_size": 8,
    "num_layers": 1,
    "embedding_size": 8,
}
LISTS: dict[str, Any] = {
    **{"rce_top_k": 5, "rce_samples": 5, "rce_pool": 15, "ce_top_k": 5, "fce_top_k": 5},
    **{"rrd_top_k": 3, "rrd_rest": 4, "rrd_pool": 10},
}
CPU = torch.device("cpu")


def score_of(user: str, item: str) -> float:
    """What the file says: some number that depends on both names."""
    return float((int(user[1:]) * 7 + int(item[1:]) * 5) % 11)


def write_scores(
    path: Path, keep: Callable[[int, int], bool] = lambda u, i: (u + i) % 3 == 0, scale: float = 1
) -> Path:
    rows = [(f"u{u}", f"i{i}") for u in range(N_USERS) for i in range(N_ITEMS) if keep(u, i)]
    lines = ["user,item,score", *(f"{u},{i},{scale * score_of(u, i)}" for u, i in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with the latest interactions first, `BPR.pth`, `LightGCN.pth` (other ids), `a.csv`, …"""
    folder = tmp_path_factory.mktemp("teachers")
    write_atomic_file(
        folder / "tiny" / "tiny.inter",
        ("user_id:token", "item_id:token", "timestamp:float"),
        [(user, item, -n) for n, (user, item) in enumerate(PAIRS)],
    )
    for model, more in (
        ("BPR", {"embedding_size": 8}),
        ("LightGCN", {"rm_dup_inter": "first", "n_layers": 1}),
        ("ItemKNN", {"k": 4}),
        ("NeuMF", {"mf_embedding_size": 4, "mlp_embedding_size": 4, "mlp_hidden_size": [4]}),
        ("GRU4Rec", SEQUENTIAL),
    ):
        bundle = build(folder, model, **{**IN_TIME, **more})
        drawn = build_model(bundle)
        if model == "NeuMF":  # whose first scores are all but equal
            for parameter in drawn.parameters():
                parameter.data.mul_(10)
        save_untrained(bundle, folder / f"{model}.pth", drawn)
    write_scores(folder / "a.csv")
    return folder


@pytest.fixture(scope="module")
def student(folder: Path) -> Bundle:
    return build(folder, "BPR", **IN_TIME)


@pytest.fixture(scope="module")
def sequential_student(folder: Path) -> Bundle:
    return build(folder, "GRU4Rec", **{**IN_TIME, **SEQUENTIAL})


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def everybody(bundle: Bundle) -> Interaction:
    return Interaction({"user_id": torch.arange(1, int(bundle.dataset.user_num))})


def asked(bundle: Bundle, teacher: Any) -> Tensor:
    """The teacher's full rows, as evaluation gets them."""
    rows: Tensor = teacher.score_rows(everybody(bundle))
    return rows


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [True, False])
def test_several_files_are_one_teacher(folder: Path, student: Bundle, as_list: bool) -> None:
    paths = [folder / "BPR.pth", folder / "a.csv", folder / "LightGCN.pth"]
    teacher = load_teacher(paths if as_list else " , ".join(map(str, paths)), student.train)
    assert isinstance(teacher, TeacherEnsemble)
    assert [type(part) for part in teacher.parts] == [
        CheckpointTeacher,
        ScoreFileTeacher,
        CheckpointTeacher,
    ]
    assert teacher.name == "BPR + a.csv + LightGCN"
    assert teacher.source == ",".join(map(str, paths))
    assert teacher.weights == [1.0, 1.0, 1.0]
    assert not teacher.scores_rows


def test_one_is_itself(folder: Path, student: Bundle) -> None:
    for source in (
        folder / "a.csv",
        str(folder / "a.csv"),
        [folder / "a.csv"],
        f"{folder / 'a.csv'},",
    ):
        assert isinstance(load_teacher(source, student.train), ScoreFileTeacher)
    assert isinstance(load_teacher([folder / "BPR.pth"], student.train), Teacher)


def test_a_comma_in_a_name(student: Bundle, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "users, items.csv")
    assert source_list(path) == source_list(str(path)) == [str(path)]
    assert isinstance(load_teacher(str(path), student.train), ScoreFileTeacher)
    other = write_scores(tmp_path / "b.csv")
    assert isinstance(load_teacher([path, other], student.train), TeacherEnsemble)
    assert source_list("a, b ,c") == ["a", "b", "c"]


def test_what_a_file_says(folder: Path, student: Bundle) -> None:
    teacher = load_teacher(folder / "a.csv", student.train)
    rows = asked(student, teacher)
    users, items = (student.dataset.field2id_token[field] for field in ("user_id", "item_id"))
    assert rows.shape == (N_USERS, N_ITEMS + 1)
    for row, user in enumerate(users[1:]):
        said = {i: score_of(user, i) for i in items[1:] if (int(user[1:]) + int(i[1:])) % 3 == 0}
        values = np.array(list(said.values()))
        floor = values.min() - values.std()
        expected = [-np.inf, *(said.get(item, floor) for item in items[1:])]
        assert rows[row].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_a_weight_for_each(folder: Path, student: Bundle, weights: list[float]) -> None:
    paths = [folder / "BPR.pth", folder / "a.csv"]
    with pytest.raises(
        SettingsError,
        match=rf"\[teacher_weights\] has {len(weights)} numbers, but there are 2 teachers",
    ):
        load_teacher(paths, student.train, settings=TeacherSettings(teacher_weights=weights))


def test_a_sequential_student_takes_sequential_teachers_or_others(
    folder: Path, sequential_student: Bundle
) -> None:
    train = sequential_student.train
    for general in ("BPR.pth", "a.csv"):
        with pytest.raises(
            TeacherError,
            match=rf"{general}\] users, .*GRU4Rec.pth\] rows. Take sequential ones only",
        ):
            load_teacher([folder / general, folder / "GRU4Rec.pth"], train)
    assert load_teacher([folder / "BPR.pth", folder / "a.csv"], train).scores_rows is False
    assert load_teacher([folder / "GRU4Rec.pth"] * 2, train).scores_rows is True


def test_a_general_student_takes_all_kinds(folder: Path, student: Bundle) -> None:
    assert (
        load_teacher(
            [folder / "BPR.pth", folder / "GRU4Rec.pth", folder / "a.csv"], student.train
        ).scores_rows
        is False
    )


def test_fingerprints(folder: Path, student: Bundle, tmp_path: Path) -> None:
    def mark(*names: str, **settings: Any) -> str:
        paths = [tmp_path / n if n == "b.csv" else folder / n for n in names]
        return load_teacher(paths, student.train, settings=TeacherSettings(**settings)).fingerprint

    write_scores(tmp_path / "b.csv", scale=2)
    marks = [
        mark("BPR.pth", "a.csv"),
        mark("a.csv", "BPR.pth"),
        mark("BPR.pth", "b.csv"),
        mark("BPR.pth", "a.csv", teacher_weights=[1, 2]),
        mark("BPR.pth", "a.csv", teacher_ensemble="reciprocal_rank"),
        mark("BPR.pth", "a.csv", teacher_floor=2.0),
        mark("a.csv"),
        mark("b.csv"),
        mark("BPR.pth"),
    ]
    assert len(set(marks)) == len(marks)
    assert mark("BPR.pth", "a.csv") == marks[0]
    write_scores(tmp_path / "b.csv", scale=3)  # the same name, another content
    assert mark("BPR.pth", "b.csv") != marks[2]
    write_scores(tmp_path / "b.csv")  # another name, the same content
    assert mark("BPR.pth", "b.csv") == marks[0]


# --- what several say together --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["standardised", "reciprocal_rank"])
@pytest.mark.parametrize(
    "names",
    [
        "BPR.pth LightGCN.pth",
        "BPR.pth NeuMF.pth a.csv",
        "a.csv",
        "a.csv NeuMF.pth",
        "GRU4Rec.pth BPR.pth",
    ],
)
def test_evaluation_sees_what_is_taught(
    folder: Path, student: Bundle, names: str, how: Any
) -> None:
    """Full rows equal the scores of :func:`ensemble`, for tables, matrices and lists."""
    paths = [folder / name for name in names.split()]
    if len(paths) == 1:
        paths *= 2
    weights = [1.0, 2.0, 0.5][: len(paths)]
    settings = TeacherSettings(teacher_weights=weights, teacher_ensemble=how)
    teacher = load_teacher(paths, student.train, settings=settings)
    scores = teacher.open_scores(KDSettings())
    every = torch.arange(1, int(student.dataset.user_num))
    assert_close(asked(student, teacher), scores.score_all(every))


def test_evaluation_of_rows_sees_what_is_taught(
    folder: Path, sequential_student: Bundle, tmp_path: Path
) -> None:
    other = build(folder, "GRU4Rec", **{**IN_TIME, **SEQUENTIAL, "seed": 2020})
    save_untrained(other, tmp_path / "x.pth", build_model(other, seed=5))
    teacher = load_teacher([folder / "GRU4Rec.pth", tmp_path / "x.pth"], sequential_student.train)
    dataset = sequential_student.train._dataset
    scores = teacher.open_scores(KDSettings())
    assert scores.n_contexts == len(dataset)
    assert_close(
        teacher.score_rows(dataset.inter_feat), scores.score_all(torch.arange(len(dataset)))
    )


def test_rows_of_several_processes_may_ask_for_any_user(
    folder: Path, student: Bundle, sequential_student: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users belong to a process each, but the rows of a batch are of any user."""
    given: list[Any] = []
    monkeypatch.setattr(
        "recbole_rcekd.teachers.ensemble.ensemble", lambda *args: given.append(args[5])
    )
    ranks = Ranks(1, 2)
    for bundle in (student, sequential_student):
        teacher = load_teacher([folder / "a.csv"] * 2, bundle.train)
        teacher.open_scores(KDSettings(), ranks=ranks)
    assert given == [ranks, None]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_combined_rows_by_hand() -> None:
    one, two = torch.tensor([[9.0, 1.0, 2.0, 6.0]]), torch.tensor([[9.0, 5.0, 5.0, 5.0]])
    # Of one: mean 3, deviation sqrt((4 + 1 + 9) / 3). Two is of no opinion.
    found = combined_rows([one, two], [1.0, 3.0], "standardised")
    deviation = (14 / 3) ** 0.5
    assert found[0].tolist() == pytest.approx(
        [-np.inf, *(0.25 * (x - 3) / deviation for x in (1, 2, 6))], rel=1e-6
    )
    # Equal scores stand in the order of their ids.
    ranks = combined_rows([one, two], [1.0, 3.0], "reciprocal_rank")
    expected = [-np.inf, 1 / 63 + 3 / 61, 1 / 62 + 3 / 62, 1 / 61 + 3 / 63]
    assert ranks[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_of_what_a_list_lacks_its_rank_says_nothing() -> None:
    listed = torch.tensor([[-np.inf, -np.inf, 4.0, -np.inf]], dtype=torch.float32)
    found = combined_rows([listed], [2.0], "reciprocal_rank")
    assert found[0].tolist() == pytest.approx([-np.inf, 0.0, 2 / 61, 0.0])


# --- rescaled -------------------------------------------------------------------------------------

SEEN = seen_of([(1, 1), (2, 2)], 4, 5)


def dense() -> DenseScores:
    rows = [[0, 0, 0, 0, 0], [0, 1, 3, 5, 7], [0, 2, 2, 2, 2], [0, -1, -1, 1, 1]]
    return DenseScores(np.array(rows, dtype=np.float32), SEEN)


def table() -> FactorScores:
    generator = torch.Generator().manual_seed(0)
    return FactorScores(
        torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator), SEEN
    )


def listed() -> ListedScores:
    """User 2 has no list."""
    cells = torch.tensor([[1, 2], [1, 4], [3, 1]])
    return ListedScores.with_floor(cells[:, 0], cells[:, 1], torch.tensor([4.0, 2.0, 7.0]), SEEN)


def test_standardised_by_hand() -> None:
    scores = rescaled(dense(), "standardised", 0.5)
    # User 1: mean 4, deviation sqrt(5). User 2 likes all items the same. User 3: mean 0, deviation
    # 1.
    expected = [
        [-np.inf, *((x - 4) / 5**0.5 / 0.5 for x in (1, 3, 5, 7))],
        [-np.inf, 0, 0, 0, 0],
        [-np.inf, -2, -2, 2, 2],
    ]
    assert_close(scores.score_all(torch.tensor([1, 2, 3])), torch.tensor(expected))
    assert_close(
        scores.score(torch.tensor([3, 1]), torch.tensor([[3, 1], [4, 4]])),
        torch.tensor([[2.0, -2.0], [expected[0][4]] * 2]),
    )


@pytest.mark.parametrize("how", ["raw", "standardised"])
@pytest.mark.parametrize("make", [dense, table, listed])
def test_the_ranking_stays(make: Callable[[], TeacherScores], how: Any) -> None:
    scores, plain, users = rescaled(make(), how, 2.0), make(), torch.tensor([3, 1, 2])
    assert isinstance(scores, RescaledScores)
    for unseen in (False, True):
        assert torch.equal(scores.top_k(users, 3, unseen), plain.top_k(users, 3, unseen))
    rows, before = scores.score_all(users), plain.score_all(users)
    assert torch.equal(rows.isneginf(), before.isneginf())
    if how == "raw":
        assert torch.equal(rows, before / 2)
    else:
        finite = rows[:2, 1:]
        assert_close(finite.mean(1), torch.zeros(2))
        assert_close(finite.std(1, correction=0), torch.full((2,), 0.5))
    # Seen from the items, users are on the same scale; and back.
    items = torch.arange(1, 5)
    other = scores.transposed()
    assert_close(other.score_all(items)[:, users], rows[:, 1:].t())
    assert_close(other.score(items, users.expand(4, -1)), rows[:, 1:].t())
    assert torch.equal(other.top_k(items, 2, False), plain.transposed().top_k(items, 2, False))
    assert_close(other.transposed().score_all(users), rows)


def test_of_whom_nothing_is_said_nothing_is_taught() -> None:
    for how in ("raw", "standardised"):
        scores = rescaled(listed(), how, 2.0)
        assert scores.score_all(torch.tensor([2])).isneginf().all()
        assert scores.score(torch.tensor([2]), torch.tensor([[1, 2]])).isneginf().all()


def test_nothing_to_rescale() -> None:
    scores = dense()
    assert rescaled(scores, "raw", 1.0) is scores


def test_cosines_become_logits() -> None:
    """Scores between −1 and 1, as HSTU's with ``score_scale: cosine``, get a deviation of 1."""
    generator = torch.Generator().manual_seed(1)
    rows, items = (
        torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)
        for n in (4, 300)
    )
    scores = rescaled(FactorScores(rows, items, seen_of([(1, 1)], 4, 300)), "standardised", 1.0)
    found = scores.score_all(torch.tensor([1, 2, 3]))[:, 1:]
    assert_close(found.std(1, correction=0), torch.ones(3))
    assert found.softmax(1).amax(1).min() > 3 / 300  # of raw cosines it is e / 300 at most
    cosines = (rows[1:] @ items[1:].t()).double().numpy()
    expected = (cosines - cosines.mean(1, keepdims=True)) / cosines.std(1, keepdims=True)
    assert_close(found, torch.from_numpy(expected).float())


@pytest.mark.parametrize("loss", ["ce", "rce"])
def test_a_temperature_in_training_is_a_division_of_the_scores(
    folder: Path, tmp_path: Path, loss: str
) -> None:
    def weights(teacher: Any, **settings: Any) -> Tensor:
        bundle = build(
            folder,
            "BPR",
            **{
                **IN_TIME,
                **LISTS,
                "train_batch_size": 32,
                "checkpoint_dir": str(tmp_path / "s"),
                **settings,
            },
        )
        model = build_model(bundle, seed=1)
        trainer = distill_trainer(bundle.config)(bundle.config, model, teacher(bundle), seed=0)
        trainer.fit(bundle.train, bundle.valid, saved=False, show_progress=False)
        return model.user_embedding.weight.detach()  # type: ignore[no-any-return]

    def divided(by: float) -> Callable[[Bundle], TeacherScores]:
        def make(bundle: Bundle) -> TeacherScores:
            factors = read_teacher(folder / "BPR.pth", bundle.train).factors()
            assert factors is not None
            users, items = factors
            # Large, so that a temperature matters; a power of 2 changes no rounding.
            return FactorScores(
                2**8 * users / by, items, training_interactions(bundle.train._dataset)
            )

        return make

    by_hand = weights(divided(2.0), kd_loss=loss)
    assert torch.equal(weights(divided(1.0), kd_loss=loss, kd_teacher_temperature=2.0), by_hand)
    assert not torch.equal(weights(divided(1.0), kd_loss=loss), by_hand)


# --- diagnostics of short lists -------------------------------------------------------------------


def test_short_lists_are_compared_as_far_as_they_go() -> None:
    # The student's order is 4, 3, 2, 1 for all.
    rows = torch.tensor([[-np.inf, 1.0, 2.0, 3.0, 4.0]]).repeat(3, 1).float()
    teacher = torch.tensor([[4, 1, 0], [0, 0, 0], [3, 2, 4]])
    found = distance_to_teacher(rows, teacher)
    assert found["overlap@3"] == pytest.approx((1 + 3) / (2 + 3))
    log = np.log2
    assert found["ndcg@10_to_teacher"] == pytest.approx((1 / (1 + 1 / log(3)) + 1) / 2)
    assert distance_to_teacher(rows, teacher[1:2]) == {}


def test_the_diagnostics_know_what_a_file_lists(student: Bundle, tmp_path: Path) -> None:
    """A student that agrees with the file equals its teacher, whatever follows the listed items."""
    path = write_scores(tmp_path / "a.csv", lambda u, i: (u + i) % 6 == 0 and u != 3)
    settings = TeacherSettings(teacher_missing_users="skip")
    scores = load_teacher(path, student.train, settings=settings).open_scores(KDSettings())
    seen = training_interactions(student.train._dataset)
    for teacher in (scores, rescaled(scores, "standardised", 2.0)):
        scorer = ModelScorer(build_model(student), student.train._dataset, trainable=True)
        loss: Any = LOSSES["ce"](LOSSES["ce"].settings_type.from_mapping({"ce_top_k": 5}))
        distiller = UserDistiller(
            scorer, teacher, loss, KDSettings(kd_diagnostic_users=N_USERS), seen, 0
        )
        for side in distiller._sides:
            # Equal scores stand as they are listed.
            side.score_all = lambda users: _as_listed(scores, users)
        distiller.begin_epoch(0, 1)
        found = distiller.diagnostics()
        assert found["overlap@24"] == found["ndcg@10_to_teacher"] == 1.0


def _as_listed(scores: TeacherScores, users: Tensor) -> Tensor:
    """Listed items first, in their order; the rest as it comes."""
    rows = torch.rand(len(users), scores.n_items, generator=torch.Generator().manual_seed(0))
    lists = scores.top_k(users, scores.n_items - 1, False)
    rows = rows.scatter(1, lists, torch.arange(lists.shape[1] + 1, 1, -1.0).expand(lists.shape))
    rows[:, 0] = -torch.inf
    return rows


# --- the whole command ----------------------------------------------------------------------------


def run(folder: Path, **arguments: Any) -> dict[str, Any]:
    settings = arguments.pop("settings", {})
    given = {
        **{
            "data_path": str(folder),
            "use_gpu": False,
            "state": "ERROR",
            "show_progress": False,
            "epochs": 1,
        },
        **{
            "train_batch_size": 128,
            "metrics": ["NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "seed": 2020,
        },
        **IN_TIME,
        **LISTS,
        **settings,
    }
    return run_recbole_kd(
        **{"model": "BPR", "dataset": "tiny", "output_dir": "out", **arguments}, config_dict=given
    )


def test_a_file_teaches(folder: Path, student: Bundle) -> None:
    result = run(folder, teacher=folder / "a.csv", kd_loss="scratch,rce,ce,rrd,fce")
    found = json.loads(Path("out/result.json").read_text(encoding="utf-8"))
    teacher = load_teacher(folder / "a.csv", student.train)
    assert found["teacher"] == result["teacher"]
    assert {key: value for key, value in found["teacher"].items() if "result" not in key} == {
        **{
            "model": "a.csv",
            "checkpoint": str(folder / "a.csv"),
            "fingerprint": teacher.fingerprint,
        },
        **{
            "parameters": 0,
            "checkpoint_bytes": (folder / "a.csv").stat().st_size,
            "ranking_ms_per_1000_users": 0.0,
        },
        **{"epochs": 0, "seconds": 0.0, "seconds_per_epoch": 0.0},
    }
    assert found["dataset"]["training_interactions"] == len(PAIRS) - 2 * N_USERS
    assert result["teacher"]["test_result"]["ndcg@10"] == pytest.approx(
        ndcg_of(student, teacher), abs=1e-4
    )
    lines = Path("out/summary.md").read_text(encoding="utf-8").splitlines()
    named = [line.split("|")[1].strip() for line in lines]
    assert named[2:] == [
        "teacher a.csv",
        "student alone",
        *(f"student, {x}" for x in ("rce", "ce", "rrd", "fce")),
    ]
    assert [cell.strip() for cell in lines[2].split("|")[4:6]] == ["0", "0.00 MiB"]
    for loss in ("rce", "ce", "rrd", "fce"):
        with Path(f"out/{loss}-seed2020/history.csv").open() as file:
            assert all(float(row["kd_loss"]) > 0 for row in csv.DictReader(file))


def ndcg_of(bundle: Bundle, teacher: Any) -> float:
    """NDCG@10 of the one test item, by hand; scores are made distinct first, for a unique order."""
    rows = asked(bundle, teacher).clone()
    for data in (bundle.train, bundle.valid):
        features = data._dataset.inter_feat
        rows[features["user_id"] - 1, features["item_id"]] = -torch.inf
    test = bundle.test._dataset.inter_feat
    ranks = [10**6] * len(rows)
    best = rows.topk(10, dim=1).indices
    for user, item in zip(test["user_id"].tolist(), test["item_id"].tolist(), strict=True):
        place = (best[user - 1] == item).nonzero()
        ranks[user - 1] = int(place[0]) + 1 if len(place) else 10**6
    return float(np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]))


@pytest.mark.parametrize("how", ["standardised", "reciprocal_rank"])
def test_three_checkpoints_teach(folder: Path, student: Bundle, how: str) -> None:
    """A table, a graph model in other ids and an item-based model."""
    paths = [folder / f"{name}.pth" for name in ("BPR", "LightGCN", "ItemKNN")]
    settings = {"teacher_ensemble": how, "teacher_weights": [1, 2, 1]}
    result = run(folder, teacher=paths, kd_loss="rce,rrd", settings=settings)
    read = TeacherSettings(
        teacher_ensemble=how,  # type: ignore[arg-type]
        teacher_weights=[1, 2, 1],
    )
    teacher = load_teacher(paths, student.train, settings=read)
    found = json.loads(Path("out/result.json").read_text(encoding="utf-8"))["teacher"]
    assert found["model"] == "BPR + LightGCN + ItemKNN"
    assert found["checkpoint"] == ",".join(map(str, paths))
    assert found["fingerprint"] == teacher.fingerprint
    # ItemKNN has one unused parameter.
    assert found["parameters"] == (N_USERS + 1 + N_ITEMS + 1) * (8 + 4) + 1
    assert found["checkpoint_bytes"] == sum(path.stat().st_size for path in paths)
    assert found["ranking_ms_per_1000_users"] > 0
    assert found["test_result"]["ndcg@10"] == pytest.approx(ndcg_of(student, teacher), abs=1e-4)
    assert (
        Path("out/summary.md")
        .read_text(encoding="utf-8")
        .count("| teacher BPR + LightGCN + ItemKNN |")
        == 1
    )
    # The same command finds its runs, also if the files are named in one text.
    assert (
        run(folder, teacher=paths, kd_loss="rce,rrd", settings=settings)["runs"] == result["runs"]
    )
    # And its student can teach, without trust: its Config holds text, not paths.
    assert read_teacher(result["runs"][0]["checkpoint"], student.train).name == "BPR"


@pytest.mark.parametrize("how", ["raw", "standardised"])
@pytest.mark.parametrize("model", ["BPR", "GRU4Rec"])
def test_users_of_whom_a_file_says_nothing(
    folder: Path, tmp_path: Path, model: str, how: str
) -> None:
    path = write_scores(tmp_path / "some.csv", lambda u, i: (u + i) % 3 == 0 and u % 2 == 0)
    settings = {
        "teacher_missing_users": "skip",
        "kd_teacher_scores": how,
        "fce_target": "all",
        "cd_pool": 10,
    }
    settings |= {"cd_items": 4, **(SEQUENTIAL if model == "GRU4Rec" else {})}
    result = run(folder, model=model, teacher=path, kd_loss="rce,ce,rrd,fce,cd", settings=settings)
    for each in result["runs"]:
        with Path(f"out/{each['loss']}-seed2020/history.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert 0 < float(row["kd_loss"]) < 1e3
        assert np.isfinite([float(value) for value in row.values() if value]).all()
        weights = torch.load(each["checkpoint"], weights_only=False)["state_dict"]
        assert all(weight.isfinite().all() for weight in weights.values())


def test_what_is_refused_before_data_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "recbole_rcekd.experiment.create_dataset", lambda config: pytest.fail("data were read")
    )
    with pytest.raises(
        SettingsError,
        match=r"names 2 teachers, but there is no file \[BPR\]: several teachers are files",
    ):
        run(folder, teacher=f"BPR,{folder / 'a.csv'}")
    with pytest.raises(
        SettingsError, match=r"\[teacher_weights\] has 1 numbers, but there are 2 teachers"
    ):
        run(
            folder,
            teacher=[folder / "BPR.pth", folder / "a.csv"],
            settings={"teacher_weights": [1]},
        )
    with pytest.raises(
        SettingsError,
        match=r"\[teacher_epochs\] has no effect: the teacher in .*a.csv\] is trained",
    ):
        run(folder, teacher=folder / "a.csv", settings={"teacher_epochs": 3})


def test_a_model_named_in_a_list_is_trained(folder: Path) -> None:
    settings = {"teacher_epochs": 1, "teacher_embedding_size": 4}
    assert (
        run(folder, teacher=["BPR"], kd_loss="rce", settings=settings)["teacher"]["model"] == "BPR"
    )


def test_ensembles_take_any_scores() -> None:
    """:func:`ensemble` of what a file and a table say, as in a pipeline of one's own."""
    scores = ensemble([listed(), table()], [1.0, 1.0], "standardised", SEEN)
    assert scores.top_k(torch.tensor([2]), 2, False).ne(0).all()
