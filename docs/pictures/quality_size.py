"""Draw ``quality_size.svg``: test NDCG@10 against the number of parameters, from a recorded run.

    python docs/pictures/quality_size.py

Every number comes from ``results/citeulike-mf/result.json``. The picture has a background of its
own, so that it is legible on light and on dark pages.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[1] / "results" / "citeulike-mf" / "result.json"
METRIC = "ndcg@10"
NAMES = {
    "scratch": "student alone",
    "ce": "cross-entropy on the teacher's top 50",
    "cd": "CD",
    "rrd": "RRD",
    "rce": "RCE-KD",
}
WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 78, 726, 84, 370
# Parameters (logarithmic) and scores at the edges of the drawing.
SIZES, SCORES = (3e5, 2e7), (0.005, 0.0175)
INK, QUIET, LINE, RED, BLUE, GREY = (
    *("#1f2933", "#52606d", "#d9dee3"),
    *("#c8372d", "#2b6cb0", "#7b8794"),
)


def x_of(size: float) -> float:
    """Where a number of parameters stands."""
    low, high = (math.log10(edge) for edge in SIZES)
    return LEFT + (math.log10(size) - low) / (high - low) * (RIGHT - LEFT)


def y_of(score: float) -> float:
    """Where a score stands."""
    return BOTTOM - (score - SCORES[0]) / (SCORES[1] - SCORES[0]) * (BOTTOM - TOP)


def text(x: float, y: float, words: str, size: int = 14, colour: str = INK, **more: str) -> str:
    """One line of text; ``more``: attributes, with ``_`` for ``-``."""
    given = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    # The halo keeps grid lines out of the letters.
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" stroke="#ffffff" '
        f'stroke-width="5" stroke-linejoin="round" paint-order="stroke"{given}>{words}</text>'
    )


def number(value: float) -> str:
    """As in the tables: ``.0160``."""
    return f"{value:.4f}".lstrip("0")


def axes() -> list[str]:
    """Grid lines with their numbers."""
    parts = []
    for score in (0.006, 0.008, 0.010, 0.012, 0.014, 0.016):
        y = y_of(score)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{LINE}"/>')
        words = f"{score:.3f}".lstrip("0")
        parts.append(text(LEFT - 10, y + 4.5, words, 13, QUIET, text_anchor="end"))
    for size, words in (
        (5e5, "½ million"),
        (1e6, "1 million"),
        (3e6, "3 million"),
        (1e7, "10 million"),
    ):
        x = x_of(size)
        parts.append(f'<path d="M{x:.1f} {BOTTOM}v6" stroke="{GREY}"/>')
        parts.append(text(x, BOTTOM + 23, words, 13, QUIET, text_anchor="middle"))
    parts.append(f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="{GREY}"/>')
    parts.append(
        text((LEFT + RIGHT) / 2, BOTTOM + 46, "parameters", 13, QUIET, text_anchor="middle")
    )
    return parts


def point(x: float, y: float, colour: str, radius: float, deviation: float = 0.0) -> list[str]:
    """A dot, with a whisker of one standard deviation to each side."""
    whisker = abs(y_of(deviation) - y_of(0.0))
    line = f'<path d="M{x:.1f} {y - whisker:.1f}V{y + whisker:.1f}" stroke="{colour}" '
    parts = [f'{line}stroke-width="2.5" stroke-opacity=".55"/>'] if deviation else []
    return [*parts, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>']


def draw(record: dict[str, Any]) -> str:
    """The picture as SVG."""
    teacher, students = record["teacher"], record["summary"]
    times = teacher["parameters"] / students[0]["parameters"]
    seeds = len(students[0]["seeds"])
    best = next(each for each in students if each["loss"] == "rce")
    goal = teacher["test_result"][METRIC]
    parts = [
        text(
            *(24, 36, f"The teacher's quality in a model {times:.0f} times smaller", 19, INK),
            font_weight="600",
        ),
        text(
            24,
            60,
            f"CiteULike, matrix factorisation 400 → 20 dimensions. Test NDCG@10, {seeds} seeds, "
            "± one standard deviation.",
            13,
            QUIET,
        ),
        *axes(),
    ]
    # From the teacher to the student that was distilled from it.
    x, y = x_of(teacher["parameters"]), y_of(goal)
    near, level = x_of(best["parameters"]), y_of(best["test"][METRIC])
    parts.append(
        f'<path d="M{x - 14:.1f} {y:.1f}L{near + 140:.1f} {level:.1f}" stroke="{RED}" '
        'stroke-width="1.5" stroke-dasharray="5 5" stroke-opacity=".6"/>'
    )
    parts += point(x, y, BLUE, 8)
    parts.append(text(x, y - 18, "teacher", 15, BLUE, text_anchor="middle", font_weight="600"))
    parts.append(text(x, y + 28, number(goal), 13, QUIET, text_anchor="middle"))
    for each in students:
        score, deviation = each["test"][METRIC], each["std"][METRIC]
        ours = each["loss"] == "rce"
        colour = RED if ours else INK if each["loss"] == "scratch" else GREY
        spot = x_of(each["parameters"]), y_of(score)
        parts += point(*spot, colour, 8 if ours else 6, deviation)
        name = f'<tspan font-weight="{600 if ours else 400}">{NAMES[each["loss"]]}</tspan>'
        value = f'<tspan fill="{QUIET}" font-size="13" dx="7">{number(score)}</tspan>'
        parts.append(text(spot[0] + 17, spot[1] + 5, name + value, 15 if ours else 14, colour))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        "<title>Test NDCG@10 against the number of parameters, CiteULike</title>\n"
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" fill="#ffffff" '
        f'stroke="{LINE}"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    (HERE / "quality_size.svg").write_text(
        draw(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8"
    )
