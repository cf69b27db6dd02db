"""The courses of several runs side by side, from files with made-up numbers."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from recbole_rcekd import analyse
from recbole_rcekd.cli import main
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.evaluation import curves
from recbole_rcekd.evaluation.tables import as_text
from recbole_rcekd.training.history import History

Rows = list[dict[str, float]]


def write(file: Path, rows: Rows) -> None:
    """As a training does."""
    history = History(file)
    for row in rows:
        history.begin(int(row["epoch"]))
        history.note(**{name: value for name, value in row.items() if name != "epoch"})


def course(n: int, start: float, with_gap: bool = True) -> Rows:
    rows: Rows = []
    for epoch in range(n):
        row = {
            "epoch": epoch,
            "train_loss": 1.0,
            "overlap@50": start + epoch / 100,
            "ndcg@10_to_teacher": epoch / 50,
        }
        if with_gap:
            row["closure_gap"] = 1 / (1 + epoch)
        if epoch % 3 == 2:
            row |= {"valid_seconds": 1.0, "valid_recall@10": 0.2, "valid_ndcg@10": epoch / 1000}
        rows.append(row)
    return rows


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What a command leaves in its output_dir: two methods, and a student alone."""
    folder = tmp_path / "out"
    write(folder / "rce-seed0" / "history.csv", course(13, 0.1))
    write(folder / "rrd-seed0" / "history.csv", course(4, 0.5, with_gap=False))
    alone = [{"epoch": epoch, **({"valid_ndcg@10": 0.5} if epoch else {})} for epoch in range(3)]
    write(folder / "scratch-seed0" / "history.csv", alone)
    return folder


def test_tables_by_hand(out: Path) -> None:
    histories = curves.read_histories([str(out)])
    assert list(histories) == ["rce-seed0", "rrd-seed0", "scratch-seed0"]
    columns = curves.quantities(histories)
    assert columns == ["ndcg@10_to_teacher", "overlap@50", "closure_gap", "valid_ndcg@10"]
    to_teacher, overlap, gap, valid = curves.tables(histories, columns)
    assert to_teacher[1] == ["epoch", "rce-seed0 (to 12)", "rrd-seed0 (to 3)"]
    assert overlap[2] == [
        ["0", "0.1000", "0.5000"],
        ["1", "0.1100", "0.5100"],
        ["2", "0.1200", "0.5200"],
        ["5", "0.1500", "–"],
        ["10", "0.2000", "–"],
        ["last", "0.2200", "0.5300"],
    ]
    assert gap[1] == ["epoch", "rce-seed0 (to 12)"]
    # Validated in epochs 2, 5, 8 and 11.
    assert [row[1] for row in valid[2]] == ["–", "–", "0.0020", "0.0050", "0.0080", "0.0110"]
    assert valid[2][-1] == ["last", "0.0110", "0.0020", "0.5000"]


def test_which_validation_is_shown(out: Path) -> None:
    histories = curves.read_histories([str(out)])
    assert curves.quantities(histories, "Recall@10")[-1] == "valid_recall@10"
    assert curves.quantities(histories, "MRR@10")[-1] == "valid_ndcg@10"
    assert curves.quantities({"x": [{"epoch": 0, "valid_seconds": 1, "valid_hit@5": 1}]}) == [
        "valid_hit@5"
    ]


def test_names_of_runs(out: Path, tmp_path: Path) -> None:
    write(tmp_path / "more" / "rce-seed0" / "history.csv", course(2, 0.0))
    write(tmp_path / "saved" / "BPR-rce-x.history.csv", course(2, 0.0))
    single = str(out / "rce-seed0" / "history.csv")
    assert list(curves.read_histories([single])) == ["rce-seed0"]
    assert list(curves.read_histories([single, str(tmp_path / "saved")])) == [
        "rce-seed0",
        "BPR-rce-x",
    ]
    assert list(curves.read_histories([single, str(tmp_path / "more")])) == [
        "out/rce-seed0",
        "more/rce-seed0",
    ]
    assert list(curves.read_histories([single, str(out)])) == [
        "rce-seed0",
        "rrd-seed0",
        "scratch-seed0",
    ]


def test_files(out: Path, tmp_path: Path) -> None:
    result = analyse(history=out, output_dir=tmp_path / "seen")
    with (tmp_path / "seen" / "curves.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 + 4 + 3
    assert rows[5] == {
        **{"run": "rce-seed0", "epoch": "5", "overlap@50": "0.15", "ndcg@10_to_teacher": "0.1"},
        **{"closure_gap": "0.166667", "valid_ndcg@10": "0.005"},
    }
    assert rows[-3]["valid_ndcg@10"] == ""
    assert json.loads((tmp_path / "seen" / "analysis.json").read_text(encoding="utf-8")) == result
    assert set(result["curves"]["runs"]) == {"rce-seed0", "rrd-seed0", "scratch-seed0"}
    assert as_text(result, "github") + "\n" == (tmp_path / "seen" / "analysis.md").read_text(
        encoding="utf-8"
    )


def test_the_command(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output_dir alone is looked at, and what is found is put there too."""
    assert main(["--analyse", f"--output_dir={out}"]) == 0
    shown = capsys.readouterr().out
    assert "overlap@50 by epoch" in shown
    assert f"Written to [{out}]." in shown
    assert (out / "curves.csv").exists()
    both = f"{out}/rce-seed0,{out / 'rrd-seed0' / 'history.csv'}"
    assert main(["--analyse", f"--history={both}"]) == 0
    assert "scratch" not in capsys.readouterr().out


def test_a_picture(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    histories = curves.read_histories([str(out)])
    for n in (1, 3, 4):
        assert curves.draw_curves(tmp_path / "a.svg", histories, curves.quantities(histories)[-n:])
        assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_no_picture_without_matplotlib(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not curves.draw_curves(tmp_path / "a.svg", {}, ["x"])
    assert not (tmp_path / "a.svg").exists()
    analyse(history=out, output_dir=tmp_path / "seen")
    assert not (tmp_path / "seen" / "curves.svg").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no history: give the output_dir"),
        ("", "it has no rows, or no column"),
        ("a,b\n1,2\n", r"no column \[epoch\]"),
        ("epoch,overlap@50\n0,high\n", "could not convert"),
        ("epoch,train_loss\n0,1\n", "has nothing to compare"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "history.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        analyse(history=file)


def test_a_folder_without_histories(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is no history"):
        analyse(history=tmp_path)
