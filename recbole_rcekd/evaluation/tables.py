"""The tables of an analysis, for the terminal and for ``analysis.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from recbole_rcekd.evaluation import curves
from recbole_rcekd.training.diagnostics import NDCG_AT

# RecBole's metrics that describe the items in top-K lists. A higher value is not better or worse.
OF_LISTS = ("averagepopularity", "itemcoverage")
_CALLED = {"teacher": "teacher", "baseline": "student alone", "student": "student"}
_SETS = {"teacher": "teacher's top", "student": "student's top", "union": "both", "rce": "RCE-KD's"}


def as_text(result: Mapping[str, Any], style: str = "simple_outline") -> str:
    """The tables of an analysis.

    Args:
        result: what :func:`~recbole_rcekd.evaluation.analysis.analyse` returned.
        style: a format of tabulate; ``github`` is markdown.
    """
    tables: list[curves.Table] = []
    heads = []
    if "models" in result:
        models = "".join(
            f"\n{_CALLED[name]}: {model['model']} [{model['source']}]"
            for name, model in result["models"].items()
        )
        heads.append(f"{result['dataset']['name']}{models}")
        tables += [
            _test_table(result),
            *_distance_tables(result["distance"]),
            _group_table(result["groups"]),
        ]
    if "curves" in result:
        tables += curves.tables(result["curves"]["runs"], result["curves"]["columns"])
    parts = []
    for title, header, rows in tables:
        align = ["left"] + ["right"] * (len(header) - 1)
        body = tabulate(rows, header, tablefmt=style, disable_numparse=True, colalign=align)
        parts.append(f"{title}\n\n{body}")
    return "\n\n".join(
        [head.replace("\n", "  \n" if style == "github" else "\n") for head in heads] + parts
    )


def _test_table(result: Mapping[str, Any]) -> curves.Table:
    test = result["test"]
    names = [name for name in test["result"]["teacher"] if not name.startswith(OF_LISTS)]
    of_lists = [f"{name}@{NDCG_AT}" for name in OF_LISTS]
    overlap = f"overlap@{NDCG_AT}"
    rows = []
    for who, found in test["result"].items():
        cells = [_number(found[name]) for name in names] + [
            f"{found[of_lists[0]]:.1f}",
            _number(found[of_lists[1]]),
        ]
        rows.append([_CALLED[who], *cells, _number(test[overlap].get(who))])
    if test["transfer_ratio"]:
        rows.append(
            ["transferred", *(_share(test["transfer_ratio"][name]) for name in names), "", "", ""]
        )
    header = ["", *names, f"popularity@{NDCG_AT}", f"coverage@{NDCG_AT}", overlap]
    return (
        f"Test set, {test['n']:,} lists, without what users have (RecBole's evaluation)",
        header,
        rows,
    )


def _distance_tables(distance: Mapping[str, Any]) -> list[curves.Table]:
    learners = [name for name in ("baseline", "student") if distance.get(name)]
    if not learners:
        return []
    whom = f"{distance['n_told']:,} of {distance['of_all']:,} training {distance['of']}"
    of = {name: distance[name] for name in learners}
    lengths, positions = of[learners[0]]["overlap"], of[learners[0]]["rank"]
    overlap = [
        [_CALLED[name], *(_number(value) for value in found["overlap"].values())]
        for name, found in of.items()
    ]
    header, ranks = ["k"], [[str(position)] for position in positions]
    for name, found in of.items():
        header += [f"{_CALLED[name]}: median", "quartiles", "mean"]
        for row, position in zip(ranks, positions, strict=True):
            spread = found["rank"][position]
            row += [
                f"{spread['median']:,.0f}",
                f"{spread['q1']:,.0f} – {spread['q3']:,.0f}",
                f"{spread['mean']:,.1f}",
            ]
    to_teacher = f"ndcg@{NDCG_AT}_to_teacher"
    sets = [f"Δ of {_SETS[name]}" for name in of[learners[0]]["closure_gap"]]
    gaps = [
        [
            _CALLED[name],
            _number(found[to_teacher]),
            *(_number(gap) for gap in found["closure_gap"].values()),
        ]
        for name, found in of.items()
    ]
    return [
        (
            f"Overlap@K: share of the teacher's top K in the student's, {whom}",
            ["K", *map(str, lengths)],
            overlap,
        ),
        (f"Rank that the student gives to the teacher's k-th item, {whom}", header, ranks),
        (
            f"NDCG to the teacher, and closure gaps Δ in nats, {whom}",
            ["", f"ndcg@{NDCG_AT}", *sets],
            gaps,
        ),
    ]


def _group_table(groups: Sequence[Mapping[str, Any]]) -> curves.Table:
    ndcg, overlap = f"ndcg@{NDCG_AT}", f"overlap@{NDCG_AT}"
    ratio = "transfer_ratio" in groups[0]
    header = ["history", "lists"]
    for quantity in (ndcg, overlap):  # the quantity is named in its first column only
        names = [_CALLED[name].removeprefix("student ") for name in groups[0][quantity]]
        header += [f"{quantity}: {names[0]}", *names[1:]]
    header += ["transferred"] if ratio else []
    rows = []
    for group in groups:
        low, high = group["history"]
        row = [f"{low} – {high}" if low < high else f"{low}", f"{group['n']:,}"]
        row += [_number(value) for value in [*group[ndcg].values(), *group[overlap].values()]]
        rows.append(row + ([_share(group["transfer_ratio"])] if ratio else []))
    return "Test set by length of the training history", header, rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0%}"
