"""Figures of several rounds as median and spread: a table for the screen, and a plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sf_local.errors import RequestError

PANELS = (  # title, a regex for the figures' names whose group is x, what x is
    ("prefill, tokens/s", r"prefill, (\d+) tokens", "tokens of the prompt"),
    ("decode, tokens/s", r"decode, (\d+) rows?", "rows"),
    ("decode of one row, tokens/s", r"decode, context (\d+)", "tokens before"),
)
ROOFLINE = r"(.*): share of (.*)"  # the names of figures in percent of a measured maximum


@dataclass(frozen=True)
class Figure:
    """One measured value; `wanted` is the bound it should keep, as text such as "<= 1.5"."""

    name: str
    value: float
    unit: str
    wanted: str = ""


def summary(figures: Sequence[Figure]) -> dict[str, dict[str, Any]]:
    """By name: unit, wanted, all values, and their median, min and max."""
    result: dict[str, dict[str, Any]] = {}
    for figure in figures:
        empty = {"unit": figure.unit, "wanted": figure.wanted, "values": []}
        result.setdefault(figure.name, empty)["values"].append(figure.value)
    for entry in result.values():
        values = entry["values"]
        entry |= {"median": median(values), "min": min(values), "max": max(values)}
    return result


def table(report: dict[str, Any]) -> str:
    """The figures of a report as lines of aligned columns."""
    rows = [("", "median", "min..max", "unit", "wanted")]
    for name, figure in report["figures"].items():
        low, middle, high = (_short(figure[key]) for key in ("min", "median", "max"))
        rows.append((name, middle, f"{low}..{high}", figure["unit"], figure["wanted"]))
    a, b, c, d = (max(len(row[i]) for row in rows) for i in range(4))
    lines = (f"{r[0]:{a}}  {r[1]:>{b}}  {r[2]:>{c}}  {r[3]:{d}}  {r[4]}" for r in rows)
    return "\n".join(line.rstrip() for line in lines)


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
    """Draw speeds by size, with their spread, and the shares of the roofline, to `path`."""
    from matplotlib.figure import Figure as Canvas  # it needs no display

    canvas = Canvas(figsize=(10, 7), layout="constrained")
    *speeds, shares = canvas.subplots(2, 2).flat
    for axes, (title, pattern, label) in zip(speeds, PANELS, strict=True):
        _points(axes, {int(match[1]): f for match, f in _matching(report, pattern)})
        axes.set(title=title, xlabel=label, ylim=(0, None))
    found = _matching(report, ROOFLINE)
    names = [match[0].replace(": ", "\n") for match, _ in found]
    shares.barh(names, [figure["median"] for _, figure in found], color="lightsteelblue")
    for row, name in enumerate(names):
        shares.text(1, row, name, va="center")
    shares.set(title="share of the roofline, %", xlim=(0, 100), yticks=[])
    canvas.suptitle(f"{report['model'] or report['artifact']} on {report['cpu']}")
    canvas.savefig(path, dpi=150)


def _points(axes: Any, points: dict[int, dict[str, Any]]) -> None:
    middles = [f["median"] for f in points.values()]
    below = [f["median"] - f["min"] for f in points.values()]
    above = [f["max"] - f["median"] for f in points.values()]
    axes.set_xscale("log", base=2)
    axes.errorbar(list(points), middles, [below, above], marker="o", capsize=3)
    axes.set_xticks(list(points), list(map(str, points)))
    axes.minorticks_off()


def _matching(report: dict[str, Any], pattern: str) -> list[tuple[re.Match[str], dict[str, Any]]]:
    found = ((re.fullmatch(pattern, name), f) for name, f in report["figures"].items())
    return [(match, figure) for match, figure in found if match]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
