"""Figures of several rounds as median and spread: a table for the screen, and a plot."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

from sf_local.errors import RequestError

PANELS = (  # title, a regex for the figures' names whose group is x, what x is
    ("prefill, tokens/s", r"prefill, (\d+) tokens", "tokens of the prompt"),
    ("decode, tokens/s", r"decode, (\d+) rows?", "rows"),
    ("decode of one row, tokens/s", r"decode, context (\d+)", "tokens before"),
)
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
ROOFLINE = r"(.*): share of (.*)"  # the names of figures in percent of a measured maximum


@dataclass(frozen=True)
class Figure:
    """One measured value; `wanted` is the bound it should keep, if any: a comparison of
    COMPARISONS with a number, such as "<= 1.5"."""

    name: str
    value: float
    unit: str
    wanted: str = ""


def summary(figures: Sequence[Figure]) -> dict[str, dict[str, Any]]:
    """By name: unit, wanted, all values, their median, min and max, and whether the median is as
    wanted (`met`; None without a bound)."""
    result: dict[str, dict[str, Any]] = {}
    for figure in figures:
        empty = {"unit": figure.unit, "wanted": figure.wanted, "values": []}
        result.setdefault(figure.name, empty)["values"].append(figure.value)
    for entry in result.values():
        values = entry["values"]
        entry |= {"median": median(values), "min": min(values), "max": max(values)}
        entry["met"] = _is_met(entry["median"], entry["wanted"])
    return result


def _is_met(value: float, wanted: str) -> bool | None:
    """Whether a value, as it is shown, keeps a bound; None for none."""
    if not wanted:
        return None
    comparison, bound = wanted.split()
    return bool(COMPARISONS[comparison](float(_short(value)), float(bound)))


def table(report: dict[str, Any]) -> str:
    """The figures of a report as lines of aligned columns, those that miss their bounds marked.

    The spread is that of several rounds.
    """
    has_spread = report["rounds"] > 1
    rows = [("", "median", *["min..max"] * has_spread, "unit", "wanted", "")]
    marks = {True: "ok", False: "MISSED", None: ""}
    for name, figure in report["figures"].items():
        low, middle, high = (_short(figure[key]) for key in ("min", "median", "max"))
        spread = [f"{low}..{high}"] * has_spread
        rows.append((name, middle, *spread, figure["unit"], figure["wanted"], marks[figure["met"]]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = f"<>{'>' * has_spread}<<<"
    lines = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    bounds = [figure["met"] for figure in report["figures"].values() if figure["wanted"]]
    if bounds:
        lines += ["", f"{sum(bounds)} of {len(bounds)} bounds are met"]
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Check before the measurements that `plot` will work after them.

    Raises:
        RequestError: matplotlib is not installed, or `path` is no image file in a folder.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f'plot={str(path)!r} needs matplotlib: pip install "sf-local[bench]"'
        ) from error
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise RequestError(
            f"plot={str(path)!r} must be a .png, .svg or .pdf file in a folder that exists"
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw speeds by size, with the spread of several rounds, and the shares of the roofline, to
    `path`."""
    from matplotlib.figure import Figure as Canvas  # it needs no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches around each part
    canvas = Canvas(figsize=(11, 8), layout=layout)
    *speeds, shares = canvas.subplots(2, 2).flat
    for axes, (title, pattern, label) in zip(speeds, PANELS, strict=True):
        points = {int(match[1]): f for match, f in _matching(report, pattern)}
        _points(axes, points, has_spread=report["rounds"] > 1)
        axes.set(title=title, xlabel=label)
    _shares(shares, _matching(report, ROOFLINE))
    canvas.suptitle(_title(report))
    canvas.savefig(path, dpi=150)


def _title(report: dict[str, Any]) -> str:
    """What was measured, and on what: two lines that fit the picture."""
    weights = f", {report['weights']} weights" if report["weights"] else ""
    lines = f"{report['model'] or report['artifact']}{weights}", f"on {report['machine']}"
    return "\n".join(shorten(line, 110, placeholder=" ...") for line in lines)


def _points(axes: Any, points: dict[int, dict[str, Any]], has_spread: bool) -> None:
    """Medians by size, on a logarithmic scale with room around them, and their spread."""
    middles = [f["median"] for f in points.values()]
    below = [f["median"] - f["min"] for f in points.values()]
    above = [f["max"] - f["median"] for f in points.values()]
    spread = [below, above] if has_spread else None
    axes.set_xscale("log", base=2)
    axes.errorbar(list(points), middles, spread, marker="o", capsize=3)
    axes.margins(0.1)
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(points), [f"{size:,}" for size in points])
    axes.minorticks_off()


def _shares(axes: Any, found: list[tuple[re.Match[str], dict[str, Any]]]) -> None:
    """A bar for each share, its name above it, and its number behind it."""
    values = [figure["median"] for _, figure in found]
    bars = axes.barh(range(len(found)), values, height=0.4, color="tab:blue")
    axes.bar_label(bars, [f"{value:.0f}%" for value in values], padding=3)
    for row, (match, _) in enumerate(found):
        axes.text(1, row - 0.28, f"{match[1]}: {match[2]}", va="bottom")
    axes.set(title="share of what the machine can do, %", yticks=[], xticks=range(0, 101, 20))
    axes.set_xlim(0, max(100, *values) * 1.12 if values else 100)
    axes.set_ylim(max(len(found), 1) - 0.4, -0.8)  # the first on top


def _matching(report: dict[str, Any], pattern: str) -> list[tuple[re.Match[str], dict[str, Any]]]:
    found = ((re.fullmatch(pattern, name), f) for name, f in report["figures"].items())
    return [(match, figure) for match, figure in found if match]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
