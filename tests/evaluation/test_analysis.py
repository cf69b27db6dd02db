"""Two checkpoints compared without training; every number is derived again from full scores."""

from __future__ import annotations

import csv
import json
import math
import pickle
import shutil
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_rcekd import analyse
from recbole_rcekd.cli import main
from recbole_rcekd.core.errors import KDError, SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.evaluation import model_analysis
from recbole_rcekd.evaluation.comparison import (
    quartile_groups,
    ranks_of,
    shared_items,
    transfer_ratio,
)
from recbole_rcekd.evaluation.tables import as_text
from recbole_rcekd.losses import CELoss, RCELoss
from recbole_rcekd.losses.ce import CESettings
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers import ensemble
from recbole_rcekd.teachers.ensemble import TeacherEnsemble
from recbole_rcekd.teachers.load import load_teacher
from recbole_rcekd.training.sequence_candidates import row_teacher_of
from recbole_rcekd.training.sequence_distiller import SequenceDistiller
from recbole_rcekd.training.user_distiller import UserDistiller
from tests.helpers import (
    Bundle,
    Pair,
    block_pairs,
    build,
    build_model,
    inside,
    save_untrained,
    train_and_save,
    write_dataset,
)

# isort: split
from recbole.trainer import Trainer

OVERLAPS, RANKED = (1, 5, 10, 20, 50), (1, 2, 5, 10, 20, 50)  # of those that 60 items leave
LISTS: dict[str, Any] = {"ce_top_k": 5, "rce_top_k": 5, "rce_pool": 20, "rce_samples": 0}
SEQUENTIAL: dict[str, Any] = {
    "train_neg_sample_args": None,
    "MAX_ITEM_LIST_LENGTH": 8,
    "n_layers": 1,
    "hidden_size": 8,
    "inner_size": 8,
}
IN_TIME: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": "full",
    },
}


def trained(folder: Path, name: str, model: str = "BPR", **settings: Any) -> tuple[Bundle, Any]:
    bundle = build(folder, model, **{"learning_rate": 0.02, **settings})
    return bundle, train_and_save(bundle, folder / "saved" / f"{name}.pth")


def pairs() -> list[Pair]:
    """Users with 8 to 16 interactions."""
    kept, counts = [], Counter[str]()
    for user, item in block_pairs(per_user=16):
        counts[user] += 1
        if counts[user] <= 8 + 2 * (int(user[1:]) % 5):
            kept.append((user, item))
    return kept


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("analysis"), pairs=pairs())
    with inside(folder):
        for name, size, epochs in (("teacher", 16, 6), ("student", 8, 3), ("alone", 4, 1)):
            trained(folder, name, embedding_size=size, epochs=epochs)
    return folder


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(place: Path, name: str) -> str:
    return str(place / "saved" / f"{name}.pth")


def compared(
    place: Path, teacher: Any = None, student: str = "student", users: int = 0, **more: Any
) -> dict[str, Any]:
    config = {**LISTS, **more.pop("config_dict", {})}
    teacher = checkpoint(place, "teacher") if teacher is None else teacher
    return analyse(teacher, checkpoint(place, student), users=users, config_dict=config, **more)


# --- a second derivation --------------------------------------------------------------------------


class Slow:
    """Whole matrices of scores, and who has what."""

    def __init__(self, place: Path) -> None:
        with inside(place):
            self.bundle = build(place, embedding_size=8)
            self.scores = {
                name: self.matrix(place, name) for name in ("teacher", "student", "alone")
            }
        self.parts = [
            self.pairs(part) for part in (self.bundle.train, self.bundle.valid, self.bundle.test)
        ]
        self.n_items = int(self.bundle.dataset.item_num)

    def matrix(self, place: Path, name: str) -> list[list[float]]:
        weights = torch.load(checkpoint(place, name), weights_only=False)["state_dict"]
        scores = weights["user_embedding.weight"] @ weights["item_embedding.weight"].t()
        return [[float(x) for x in row] for row in scores]

    @staticmethod
    def pairs(loader: Any) -> dict[int, set[int]]:
        taken: dict[int, set[int]] = {}
        rows = loader._dataset.inter_feat
        for user, item in zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True):
            taken.setdefault(user, set()).add(item)
        return taken

    def best(
        self, name: str, user: int, k: int, without: frozenset[int] = frozenset()
    ) -> list[int]:
        row = self.scores[name][user]
        return sorted(
            (i for i in range(1, self.n_items) if i not in without), key=lambda i: -row[i]
        )[:k]

    def rank(self, name: str, user: int, item: int) -> int:
        return self.best(name, user, self.n_items).index(item) + 1

    def gap(self, name: str, user: int, targets: list[int], support: set[int]) -> float:
        """Δ(A) of METHODS.md, T3."""
        teacher, student = self.scores["teacher"][user], self.scores[name][user]
        total_q, total_p = (
            sum(math.exp(teacher[i]) for i in targets),
            sum(math.exp(student[i]) for i in support),
        )
        found = 0.0
        for i in targets:
            missing = sum(
                student[j] > student[i] for j in range(1, self.n_items) if j not in support
            )
            found += (
                math.exp(teacher[i])
                / total_q
                * math.log(1 + math.exp(student[i]) / total_p * missing)
            )
        return found

    def test_list(self, name: str, user: int) -> list[int]:
        had = self.parts[0].get(user, set()) | self.parts[1].get(user, set())
        return self.best(name, user, 10, frozenset(had))

    def ndcg(self, name: str, user: int) -> float:
        wanted, got = self.parts[2][user], self.test_list(name, user)
        ideal = sum(1 / math.log2(r + 2) for r in range(min(10, len(wanted))))
        return sum(1 / math.log2(r + 2) for r, item in enumerate(got) if item in wanted) / ideal


@pytest.fixture(scope="module")
def slow(place: Path) -> Slow:
    return Slow(place)


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    with inside(place):
        return compared(place, baseline=checkpoint(place, "alone"))


@pytest.mark.parametrize(("learner", "name"), [("student", "student"), ("baseline", "alone")])
def test_distances_by_hand(found: dict[str, Any], slow: Slow, learner: str, name: str) -> None:
    users = sorted(slow.parts[0])
    distance = found["distance"]
    assert (distance["of"], distance["n"], distance["of_all"], distance["n_told"]) == (
        "users",
        *[len(users)] * 3,
    )
    numbers = distance[learner]
    assert numbers["overlap"] == pytest.approx(
        {
            k: statistics.fmean(
                len({*slow.best(name, u, k)} & {*slow.best("teacher", u, k)}) / k for u in users
            )
            for k in OVERLAPS
        }
    )
    discount = [1 / math.log2(r + 2) for r in range(10)]
    ndcg = [
        sum(
            d
            for d, i in zip(discount, slow.best(name, u, 10), strict=True)
            if i in slow.best("teacher", u, 10)
        )
        for u in users
    ]
    assert numbers["ndcg@10_to_teacher"] == pytest.approx(statistics.fmean(ndcg) / sum(discount))
    assert list(numbers["rank"]) == list(RANKED)
    for k in RANKED:
        ranks = [slow.rank(name, u, slow.best("teacher", u, k)[-1]) for u in users]
        q1, median, q3 = statistics.quantiles(ranks, n=4, method="inclusive")
        assert numbers["rank"][k] == pytest.approx(
            {"mean": statistics.fmean(ranks), "q1": q1, "median": median, "q3": q3}
        )


@pytest.mark.parametrize(("learner", "name"), [("student", "student"), ("baseline", "alone")])
def test_closure_gaps_by_hand(found: dict[str, Any], slow: Slow, learner: str, name: str) -> None:
    gaps: dict[str, list[float]] = {"teacher": [], "student": [], "union": [], "rce": []}
    for user in sorted(slow.parts[0]):
        theirs, own = slow.best("teacher", user, 5), slow.best(name, user, 5)
        missed = [i for i in theirs if i not in own]
        union = theirs + [i for i in own if i not in theirs]
        for which, targets in (
            ("teacher", theirs),
            ("student", own),
            ("union", union),
            ("rce", missed),
        ):
            gaps[which].append(slow.gap(name, user, targets, set(targets)))  # rce_samples: 0
    assert found["distance"][learner]["closure_gap"] == pytest.approx(
        {which: statistics.fmean(values) for which, values in gaps.items()}, abs=1e-5
    )
    assert found["distance"][learner]["closure_gap"]["student"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("learner", "name"), [("teacher", "teacher"), ("student", "student"), ("baseline", "alone")]
)
def test_test_results_are_recboles(
    found: dict[str, Any], slow: Slow, place: Path, learner: str, name: str
) -> None:
    size = {"teacher": 16, "student": 8, "alone": 4}[name]
    bundle = build(place, embedding_size=size)
    trainer = Trainer(bundle.config, build_model(bundle))
    trainer.eval_collector.data_collect(bundle.train)
    own = trainer.evaluate(bundle.test, model_file=checkpoint(place, name))
    result = found["test"]["result"][learner]
    assert set(result) == {"ndcg@10", "recall@10", "averagepopularity@10", "itemcoverage@10"}
    assert {key: result[key] for key in own} == own
    lists = {user: slow.test_list(name, user) for user in slow.parts[2]}
    counts = {
        item: sum(item in taken for taken in slow.parts[0].values()) for item in range(slow.n_items)
    }
    popularity = statistics.fmean(counts[item] for got in lists.values() for item in got)
    assert result["averagepopularity@10"] == pytest.approx(popularity, abs=1e-4)
    # RecBole counts the padding item.
    assert result["itemcoverage@10"] == round(
        len({i for got in lists.values() for i in got}) / slow.n_items, 4
    )


def test_groups_by_hand(found: dict[str, Any], slow: Slow) -> None:
    users = sorted(slow.parts[2])
    history = {user: len(slow.parts[0].get(user, ())) for user in users}
    edges = statistics.quantiles(history.values(), n=4, method="inclusive")
    members: dict[int, list[int]] = {}
    for user in users:
        members.setdefault(sum(history[user] > edge for edge in edges), []).append(user)
    assert len(found["groups"]) == len(members) > 1
    names = {"teacher": "teacher", "baseline": "alone", "student": "student"}
    for group, (_, those) in zip(found["groups"], sorted(members.items()), strict=True):
        lengths = [history[user] for user in those]
        assert (group["n"], group["history"]) == (len(those), [min(lengths), max(lengths)])
        ndcg = {
            name: statistics.fmean(slow.ndcg(own, u) for u in those) for name, own in names.items()
        }
        assert group["ndcg@10"] == pytest.approx(ndcg)
        ratio = (ndcg["student"] - ndcg["baseline"]) / (ndcg["teacher"] - ndcg["baseline"])
        assert group["transfer_ratio"] == pytest.approx(ratio)
        for learner in ("student", "baseline"):
            share = [
                len({*slow.test_list(names[learner], u)} & {*slow.test_list("teacher", u)}) / 10
                for u in those
            ]
            assert group["overlap@10"][learner] == pytest.approx(statistics.fmean(share))
    whole = (
        sum(group["n"] * group["ndcg@10"]["student"] for group in found["groups"])
        / found["test"]["n"]
    )
    assert found["test"]["result"]["student"]["ndcg@10"] == pytest.approx(whole, abs=1e-4)
    whole = (
        sum(group["n"] * group["overlap@10"]["student"] for group in found["groups"])
        / found["test"]["n"]
    )
    assert found["test"]["overlap@10"]["student"] == pytest.approx(whole)


def test_transfer_ratios(found: dict[str, Any], place: Path) -> None:
    results = found["test"]["result"]
    assert set(found["test"]["transfer_ratio"]) == {"ndcg@10", "recall@10"}
    for metric, ratio in found["test"]["transfer_ratio"].items():
        student, alone, teacher = (
            results[name][metric] for name in ("student", "baseline", "teacher")
        )
        assert ratio == pytest.approx((student - alone) / (teacher - alone))
    without = compared(place)
    assert without["test"]["transfer_ratio"] == {}
    assert "transfer_ratio" not in without["groups"][0]
    assert without["distance"]["student"] == found["distance"]["student"]


def test_transfer_of_a_metric_where_less_is_better(place: Path) -> None:
    """GiniIndex: whoever has less of it is ahead."""
    metrics = {"metrics": ["NDCG", "GiniIndex"]}
    several = compared(place, baseline=checkpoint(place, "alone"), config_dict=metrics)
    result = several["test"]["result"]
    student, alone, teacher = (
        result[name]["giniindex@10"] for name in ("student", "baseline", "teacher")
    )
    expected = (student - alone) / (teacher - alone) if teacher < alone else None
    ratio = several["test"]["transfer_ratio"]["giniindex@10"]
    assert ratio == (expected if expected is None else pytest.approx(expected))


def test_a_sample_of_users(
    found: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = compared(place, users=7)
    assert (some["distance"]["n"], some["distance"]["of_all"]) == (7, found["distance"]["of_all"])
    assert some["distance"] == compared(place, users=7)["distance"]
    assert some["distance"]["student"] != found["distance"]["student"]
    assert some["test"]["result"]["student"] == found["test"]["result"]["student"]  # all users
    monkeypatch.setattr(model_analysis, "CELLS_AT_A_TIME", 3 * 61)
    in_blocks = compared(place, users=7)["distance"]["student"]
    for name, numbers in some["distance"]["student"].items():
        assert in_blocks[name] == (numbers if name == "rank" else pytest.approx(numbers))


def test_samples_close_more(place: Path, found: dict[str, Any]) -> None:
    more = compared(place, config_dict={"rce_samples": 20})["distance"]["student"]["closure_gap"]
    few = found["distance"]["student"]["closure_gap"]
    assert more["rce"] < few["rce"]
    assert more["teacher"] == few["teacher"]


def test_a_temperature_that_is_searched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    monkeypatch.setattr(
        RCELoss, "tune", lambda loss, lists: searched.append(len(lists.student_scores_of_all()))
    )
    compared(place, users=7, config_dict={"rce_sampling_temperature": "auto"})
    assert searched == [7]


def test_the_scale_of_the_teacher(place: Path, found: dict[str, Any]) -> None:
    """It weighs the gaps, and moves no list."""
    other = compared(
        place, config_dict={"kd_teacher_scores": "standardised", "kd_teacher_temperature": 0.1}
    )
    assert other["distance"]["student"]["rank"] == found["distance"]["student"]["rank"]
    assert (
        other["distance"]["student"]["closure_gap"]["teacher"]
        != found["distance"]["student"]["closure_gap"]["teacher"]
    )


# --- all kinds of teachers and students -----------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(place: Path) -> Path:
    """Sequential and general models with one split, a score file, and a teacher with other ids."""
    with inside(place):
        trained(place, "in_time", **IN_TIME)
        trained(place, "GRU4Rec", "GRU4Rec", **SEQUENTIAL, **IN_TIME)
        trained(place, "SASRec", "SASRec", **SEQUENTIAL, **IN_TIME)
        trained(place, "NeuMF", "NeuMF", **IN_TIME)
        bundle = build(place, **IN_TIME)
        tokens, user_tokens = (
            bundle.dataset.field2id_token["item_id"],
            bundle.dataset.field2id_token["user_id"],
        )
        with (place / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "score"])
            for user in range(1, 30):
                writer.writerows(
                    [user_tokens[user], tokens[1 + (7 * user + n) % 60], -n] for n in range(12)
                )
    return place


def sources(kinds: Path, names: str) -> list[str]:
    return [
        str(kinds / "scores.csv") if name == "file" else checkpoint(kinds, name)
        for name in names.split("+")
    ]


SKIP = {"teacher_missing_users": "skip"}
PAIRS = [
    *(("in_time", "in_time"), ("NeuMF", "in_time"), ("SASRec", "in_time"), ("file", "in_time")),
    *(("in_time", "GRU4Rec"), ("SASRec", "GRU4Rec"), ("file", "GRU4Rec")),
    *(("file+in_time", "in_time"), ("NeuMF+in_time", "in_time"), ("SASRec+GRU4Rec", "SASRec")),
]


@pytest.mark.parametrize(
    ("teacher", "student"), PAIRS, ids=[f"{teacher}-{student}" for teacher, student in PAIRS]
)
def test_the_numbers_of_a_training_are_the_same(kinds: Path, teacher: str, student: str) -> None:
    """After an epoch, the distiller's diagnostics of all users are those of the analysis."""
    result = compared(kinds, sources(kinds, teacher), student, config_dict=SKIP)
    model = student if student != "in_time" else "BPR"
    bundle = build(kinds, model, **IN_TIME, **(SEQUENTIAL if student != "in_time" else {}))
    learner = build_model(bundle)
    learner.load_state_dict(
        torch.load(checkpoint(kinds, student), weights_only=False)["state_dict"]
    )
    skipping = TeacherSettings(**SKIP)  # type: ignore[arg-type]
    loaded = load_teacher(sources(kinds, teacher), bundle.train, settings=skipping)
    data, settings = bundle.train._dataset, KDSettings(kd_diagnostic_users=10_000)
    scorer = ModelScorer(learner, data)
    scores = loaded.open_scores(settings)
    loss = CELoss(CESettings(ce_top_k=5))
    told: dict[str, float]
    if model == "BPR":
        distiller = UserDistiller(scorer, scores, loss, settings, training_interactions(data), 0)
        distiller.begin_epoch(0, 1)
        told = distiller.diagnostics()
    else:
        teaching = row_teacher_of(data, scores, loaded.scores_rows)
        told = SequenceDistiller(scorer, teaching, loss, settings, data, 0).diagnostics()
    distance = result["distance"]
    assert distance["of"] == ("users" if model == "BPR" else "rows")
    assert distance["student"]["overlap"][50] == pytest.approx(told["overlap@50"], abs=2e-4)
    assert distance["student"]["ndcg@10_to_teacher"] == pytest.approx(
        told["ndcg@10_to_teacher"], abs=2e-4
    )
    assert distance["student"]["closure_gap"]["teacher"] == pytest.approx(
        told["closure_gap"], abs=2e-4
    )


@pytest.mark.parametrize("how", ["standardised", "reciprocal_rank"])
@pytest.mark.parametrize("names", ["file", "file+in_time", "NeuMF+in_time+file", "file+file"])
def test_asking_some_gives_what_training_asks_of_all(kinds: Path, names: str, how: Any) -> None:
    bundle = build(kinds, **IN_TIME)
    settings = TeacherSettings(teacher_missing_users="skip", teacher_ensemble=how)
    loaded = load_teacher(sources(kinds, names), bundle.train, settings=settings)
    if isinstance(loaded, TeacherEnsemble):
        loaded.weights = [1.0, 2.0, 1.0][: len(loaded.parts)]
    n_users, n_items = int(bundle.dataset.user_num), int(bundle.dataset.item_num)
    asked, known = (
        model_analysis._Asked(loaded, n_users, n_items),
        loaded.open_scores(KDSettings()),
    )
    users = torch.arange(1, n_users)
    every = torch.arange(n_items).expand(len(users), -1)[:, 1:]
    torch.testing.assert_close(
        asked.score(users, every), known.score(users, every), rtol=1e-4, atol=1e-4
    )
    for unseen in (False, True):
        lists, wanted = (scores.top_k(users, 20, unseen) for scores in (asked, known))
        torch.testing.assert_close(lists == 0, wanted == 0)
        of_lists, of_wanted = (known.score(users, each.clamp(min=1)) for each in (lists, wanted))
        torch.testing.assert_close(of_lists[lists > 0], of_wanted[lists > 0], rtol=1e-4, atol=1e-4)


def test_beyond_what_is_ranked_nothing_is_listed(
    kinds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble, "_RANKED", 5)
    bundle = build(kinds, **IN_TIME)
    settings = TeacherSettings(teacher_ensemble="reciprocal_rank")
    loaded = load_teacher(sources(kinds, "NeuMF+in_time"), bundle.train, settings=settings)
    assert isinstance(loaded, TeacherEnsemble)
    users, n_users = torch.arange(1, 41), int(bundle.dataset.user_num)
    parts = [part.open_scores(KDSettings()) for part in loaded.parts]
    known = ensemble.reciprocal_rank(parts, [1.0, 1.0], loaded.seen, longest=5)
    lists = model_analysis._Asked(loaded, n_users, 61).top_k(users, 20)
    assert torch.equal(lists == 0, known.top_k(users, 20) == 0)
    assert (lists[:, 10:] == 0).all()


def test_of_whom_nothing_is_said(kinds: Path) -> None:
    result = compared(kinds, sources(kinds, "file"), "in_time", config_dict=SKIP)
    assert (result["distance"]["n"], result["distance"]["n_told"]) == (40, 29)
    ranks = result["distance"]["student"]["rank"]
    assert max(ranks) == 10  # lists of 12
    assert "29 of 40 training users" in as_text(result)


def test_a_student_validated_on_a_few_candidates(place: Path, found: dict[str, Any]) -> None:
    bundle = build(place, embedding_size=8, eval_args={"mode": {"valid": "uni10", "test": "uni10"}})
    model = build_model(bundle)
    model.load_state_dict(
        torch.load(checkpoint(place, "student"), weights_only=False)["state_dict"]
    )
    save_untrained(bundle, place / "saved" / "few.pth", model)
    assert compared(place, student="few")["test"] == {**compared(place)["test"]}
    assert (
        compared(place, student="few")["test"]["result"]["student"]
        == found["test"]["result"]["student"]
    )


def test_other_metrics(place: Path) -> None:
    result = compared(place, config_dict={"metrics": ["MRR"], "topk": [5]})
    assert set(result["test"]["result"]["student"]) == {
        f"{metric}@{k}"
        for metric in ("mrr", "ndcg", "averagepopularity", "itemcoverage")
        for k in (5, 10)
    }


# --- pieces ---------------------------------------------------------------------------------------


def test_shared_items_of_short_lists() -> None:
    student = torch.tensor([[1, 2, 3], [4, 5, 6]])
    teacher = torch.tensor([[2, 1, 9], [6, 0, 0]])
    shared, listed = shared_items(student, teacher, [1, 2, 3])
    assert shared.tolist() == [0, 2, 3]
    assert listed.tolist() == [2, 3, 4]


def test_ranks_by_hand() -> None:
    rows = torch.tensor([[-torch.inf, 0.1, 0.5, 0.5, 0.3]])
    ranks = ranks_of(torch.tensor([[1, 2, 3, 4, 0]]), rows)
    assert ranks[0, :4].tolist() == [4, 1, 1, 3]
    assert ranks[0, 4].isnan()


def test_groups_of_equal_values_stay_together() -> None:
    groups = quartile_groups(torch.tensor([5, 1, 2, 3, 9, 4, 7, 8]))
    assert [(low, high, int(who.sum())) for low, high, who in groups] == [
        (1, 2, 2),
        (3, 4, 2),
        (5, 7, 2),
        (8, 9, 2),
    ]
    groups = quartile_groups(torch.tensor([3, 3, 3, 3, 3, 8]))
    assert [(low, high, who.tolist()) for low, high, who in groups] == [
        (3, 3, [True] * 5 + [False]),
        (8, 8, [False] * 5 + [True]),
    ]


def test_no_ratio_without_an_advantage() -> None:
    assert transfer_ratio(0.2, 0.1, 0.1) is None
    assert transfer_ratio(0.2, 0.1, 0.3) == pytest.approx(0.5)


# --- what is written, and what is refused ---------------------------------------------------------


def test_nothing_is_left_behind(place: Path, tmp_path: Path) -> None:
    before = sorted(place.rglob("*"))
    compared(place)
    assert not list(tmp_path.iterdir())
    assert sorted(place.rglob("*")) == before


def test_files(place: Path, tmp_path: Path) -> None:
    result = compared(place, baseline=checkpoint(place, "alone"), output_dir=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "analysis.json",
        "analysis.md",
    ]
    written = json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result))
    assert set(written) == {"format", "dataset", "metric", "models", "test", "distance", "groups"}
    text = (tmp_path / "out" / "analysis.md").read_text(encoding="utf-8")
    assert "| student alone |" in text
    documented = (Path(__file__).parents[2] / "docs" / "guides" / "analysis.md").read_text(
        encoding="utf-8"
    )
    for key in (
        *written,
        *written["test"],
        *written["distance"],
        *written["distance"]["student"],
        *written["groups"][0],
    ):
        assert f"`{key}" in documented, key


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = list(sys.argv)
    options = [f"--{key}={value}" for key, value in LISTS.items()]
    options += [
        f"--student={checkpoint(place, 'student')}",
        f"--data_path={place}",
        "--analyse_users=0",
    ]
    status = main(
        ["--analyse", f"--teacher={checkpoint(place, 'teacher')}", "--dataset=tiny", *options]
    )
    shown = capsys.readouterr()
    assert (status, shown.err, sys.argv) == (0, "", argv)
    assert shown.out == as_text(compared(place)) + "\n"
    for title in (
        "Test set, 40 lists",
        "Overlap@K",
        "Rank that",
        "closure gaps",
        "length of the training history",
    ):
        assert title in shown.out
    assert "transferred" not in shown.out
    assert not list(tmp_path.iterdir())


def test_the_data_may_have_moved(place: Path, tmp_path: Path, found: dict[str, Any]) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(place / "tiny", moved / "tiny")
    bundle = build(moved, embedding_size=8)
    model = build_model(bundle)
    model.load_state_dict(
        torch.load(checkpoint(place, "student"), weights_only=False)["state_dict"]
    )
    save_untrained(bundle, moved / "student.pth", model)
    shutil.rmtree(moved / "tiny")
    both: dict[str, Any] = {
        "teacher": checkpoint(place, "teacher"),
        "student": moved / "student.pth",
    }
    with pytest.raises(SettingsError, match=r"give --data_path, the folder above \[tiny\]"):
        analyse(**both, config_dict=LISTS)
    result = analyse(**both, users=0, config_dict={**LISTS, "data_path": str(place)})
    assert result["test"]["result"]["student"] == found["test"]["result"]["student"]


def test_ml_100k_is_wherever_recbole_is(tmp_path: Path) -> None:
    bundle = build(tmp_path, dataset="ml-100k", embedding_size=2)
    bundle.config["data_path"] = "/of/another/machine/ml-100k"
    save_untrained(bundle, tmp_path / "student.pth")
    result = analyse(tmp_path / "student.pth", tmp_path / "student.pth", users=3)
    assert result["distance"]["student"]["overlap"][200] == 1.0
    assert result["distance"]["student"]["closure_gap"]["teacher"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": None, "student": None},
            r"\[student\] is missing: give --teacher and --student",
        ),
        ({"teacher": None}, r"\[teacher\] is missing: give"),
        ({"student": None}, r"\[student\] is missing: give"),
        (
            {"student": None, "teacher": None, "history": ".", "baseline": "x.pth"},
            r"\[student\] is missing: a comparison",
        ),
        ({"users": -1}, r"\[analyse_users\] is -1, but must be a whole number"),
        ({"users": "all"}, r"\[analyse_users\] is 'all'"),
        ({"student": "absent.pth"}, r"There is no checkpoint at \[absent.pth\]"),
        ({"teacher": "absent.pth"}, r"There is no checkpoint at \[absent.pth\]"),
        (
            {"baseline": "absent.pth"},
            r"\[baseline\] cannot be compared with this student. There is no checkpoint",
        ),
        (
            {"dataset": "other"},
            r"\[dataset\] is 'other', but the student in .* was trained on \[tiny\]",
        ),
        (
            {"config_dict": {"learning_rate": 0.1}},
            r"\[learning_rate\] has no effect on an analysis",
        ),
        ({"config_dict": {"kd_loss": "rce"}}, r"\[kd_loss\] has no effect"),
        ({"config_dict": {"rrd_top_k": 5}}, r"\[rrd_top_k\] has no effect"),
        (
            {"config_dict": {"rce_top": 5}},
            r"\[rce_top\] is not a setting of distillation. Did you mean",
        ),
        ({"config_dict": {"rce_top_k": 0}}, r"\[rce_top_k\] is 0, but must be at least 1"),
        (
            {"config_dict": {}},
            r"\[rce_pool\]=200 needs a catalogue of at least 200 items, but this dataset has 60",
        ),
        ({"teacher": "other_split"}, r"learned from other interactions than this student will"),
        (
            {"baseline": "other_split"},
            r"\[baseline\] cannot be compared with this student. The teacher in .* other inter",
        ),
        ({"teacher": "other_data"}, r"was trained on \[other\], the student's dataset is \[tiny\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(place: Path, change: dict[str, Any], message: str) -> None:
    if "other_split" in change.values():
        save_untrained(build(place, seed=7), place / "saved" / "other_split.pth")
    if "other_data" in change.values():
        write_dataset(place, "other")
        save_untrained(build(place, dataset="other"), place / "saved" / "other_data.pth")
    change = {
        k: checkpoint(place, v) if str(v).startswith("other_") else v for k, v in change.items()
    }
    given: dict[str, Any] = {
        "teacher": checkpoint(place, "teacher"),
        "student": checkpoint(place, "student"),
        "config_dict": LISTS,
        **change,
    }
    with pytest.raises(KDError, match=message):
        analyse(**given)


def test_a_student_judged_by_values_is_refused(place: Path) -> None:
    bundle = build(place, "FM", metrics=["AUC"], valid_metric="AUC", eval_args={"mode": "uni10"})
    save_untrained(bundle, place / "saved" / "values.pth")
    with pytest.raises(SettingsError, match="say nothing of rankings"):
        compared(place, student="values")


def test_a_file_is_no_student(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("user,item,score\n", encoding="utf-8")
    with pytest.raises(TeacherError, match="is not a checkpoint"):
        analyse(checkpoint(place, "teacher"), file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--analyse"], "error: [student] is missing"),
        (
            ["--analyse", "--model=BPR"],
            "error: [model] has no effect on an analysis: leave it out.",
        ),
        (["--analyse", "--nproc=2"], "error: [nproc] has no effect on an analysis: leave it out."),
        (
            ["--analyse", "--student=absent.pth", "--teacher=a.pth"],
            "error: There is no checkpoint at [absent.pth].",
        ),
        (["--analyse", "--history=absent"], "error: [history] absent is no history"),
    ],
)
def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(options) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert len(shown.err.splitlines()) == 1


def test_a_student_is_for_an_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--student=a.pth", "--model=BPR"])
    assert "--student is for analyse" in capsys.readouterr().err


def test_what_lies_beside_a_checkpoint_is_not_read(kinds: Path, tmp_path: Path) -> None:
    """RecBole unpickles a dataset or loaders from the folder of the checkpoints, by their names."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("it was read",))

    (tmp_path / "saved").mkdir()
    shutil.copy(checkpoint(kinds, "in_time"), tmp_path / "saved" / "in_time.pth")
    for name in ("tiny-Dataset.pth", "tiny-for-BPR-dataloader.pth"):
        (tmp_path / "saved" / name).write_bytes(pickle.dumps(Bomb()))
    result = compared(tmp_path, checkpoint(kinds, "in_time"), "in_time")
    assert result["distance"]["student"]["overlap"][10] == 1.0
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        *("in_time.pth", "tiny-Dataset.pth", "tiny-for-BPR-dataloader.pth")
    ]
