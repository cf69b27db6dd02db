"""``benchmarks/coldest.py``: the numbers of RecBole if it has them, the others by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import build, build_model, save_untrained, write_dataset

# isort: split
from recbole.utils import get_trainer

FILE = Path(__file__).parents[2] / "benchmarks" / "coldest.py"


@pytest.fixture(scope="module")
def coldest() -> Any:
    spec = importlib.util.spec_from_file_location("coldest", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def opened(coldest: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untrained model: its ranking is any ranking."""
    folder = write_dataset(tmp_path_factory.mktemp("coldest"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytest"])
        bundle = build(
            folder,
            eval_args={"split": {"RS": [6, 1, 3]}},
            metrics=["NDCG", "Recall"],
            topk=[10, 20],
        )
        save_untrained(bundle, folder / "model.pth")
        return coldest.open_checkpoint(str(folder / "model.pth"), str(folder))


def test_all_items_are_recboles_own_numbers(
    coldest: Any, opened: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    config = opened.dataset.config
    config["metric_decimal_place"] = 9
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, opened.model)
    recbole = trainer.evaluate(opened.test, load_best_model=False)
    found, _ = coldest.measure(opened)
    assert found.ndcg == pytest.approx(recbole["ndcg@10"], abs=1e-7)
    assert found.recall == pytest.approx(recbole["recall@20"], abs=1e-7)


def test_the_coldest_fifth_against_a_slow_count(coldest: Any, opened: Any) -> None:
    trained_on = opened.train._dataset.inter_feat["item_id"].tolist()
    counts = {
        item: trained_on.count(item) for item in set(opened.dataset.inter_feat["item_id"].tolist())
    }
    cold = set(coldest.coldest_fifth(opened).nonzero().flatten().tolist())
    assert len(cold) == len(counts) // 5 == 12
    assert max(counts[item] for item in cold) <= min(counts[item] for item in set(counts) - cold)


def test_cold_items_alone_against_a_slow_derivation(coldest: Any, opened: Any) -> None:
    """User by user, with sets."""
    cold = set(coldest.coldest_fifth(opened).nonzero().flatten().tolist())
    pairs: dict[str, dict[int, set[int]]] = {"seen": {}, "test": {}}
    tested = set(
        zip(
            *(opened.test._dataset.inter_feat[f].tolist() for f in ("user_id", "item_id")),
            strict=True,
        )
    )
    for user, item in zip(
        *(opened.dataset.inter_feat[f].tolist() for f in ("user_id", "item_id")), strict=True
    ):
        pairs["test" if (user, item) in tested else "seen"].setdefault(user, set()).add(item)
    users, items = opened.model.user_embedding.weight, opened.model.item_embedding.weight
    ndcg, recall, relevant = [], [], 0
    for user, own in pairs["test"].items():
        wanted = own & cold
        if not wanted:
            continue
        scores = (items @ users[user]).tolist()
        open_items = [i for i in range(1, len(items)) if i not in pairs["seen"].get(user, set())]
        ranking = sorted(open_items, key=lambda item: -scores[item])
        gain = sum(
            1 / math.log2(place + 2) for place, item in enumerate(ranking[:10]) if item in wanted
        )
        ndcg.append(gain / sum(1 / math.log2(place + 2) for place in range(min(10, len(wanted)))))
        recall.append(len(wanted & set(ranking[:20])) / len(wanted))
        relevant += len(wanted)
    _, found = coldest.measure(opened)
    assert (found.users, found.relevant) == (len(ndcg), relevant)
    assert found.ndcg == pytest.approx(sum(ndcg) / len(ndcg))
    assert found.recall == pytest.approx(sum(recall) / len(recall))


def test_the_table(coldest: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = build(write_dataset(tmp_path), embedding_size=4)
    save_untrained(bundle, tmp_path / "a.pth", build_model(bundle))
    monkeypatch.setattr(sys, "argv", ["coldest.py", "a.pth", "a.pth", f"--data_path={tmp_path}"])
    coldest.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[4].strip() for row in rows] == ["all", "coldest fifth"] * 2
    assert rows[:2] == rows[2:]
    assert {row.split("|")[3].strip() for row in rows} == {str(4 * (41 + 61))}
    assert torch.is_grad_enabled()
