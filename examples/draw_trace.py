"""Draw a trace of `sf-local trace` or Engine(trace=...): a picture of a batch in milliseconds.

    sf-local trace demo out.json
    python examples/draw_trace.py out.json out.png

It needs matplotlib: pip install "sf-local[bench]"
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError:
    raise SystemExit('draw_trace.py needs matplotlib: pip install "sf-local[bench]"') from None

COLORS = {
    "queue": "tab:gray", "copies": "tab:brown", "images": "tab:pink", "prefill": "tab:blue",
    "decode": "tab:green", "sampling": "tab:orange", "masks": "tab:red", "text": "tab:purple",
    "other": "black", "prepare": "tab:olive", "wait": "gainsboro", "preempted": "tab:cyan",
}  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The events. A trace that nobody closed lacks the last bracket, as the format allows."""
    text = path.read_text()
    return json.loads(text if text.endswith("]\n") else text + "]")


def tracks(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The slices of each track of the first device and its requests, from top to bottom."""
    names, slices = {}, defaultdict(list)
    for event in events:
        place = event["pid"], event.get("tid", 0)
        if event["name"] == "thread_name":
            names[place] = event["args"]["name"]
        elif event["ph"] == "X" and event["pid"] <= 2:
            slices[place].append(event)
    return {names[place]: slices[place] for place in sorted(slices)}


def draw(events: list[dict[str, Any]], path: Path) -> None:
    rows = tracks(events)
    rows.pop("steps", None)
    every = [event for slices in rows.values() for event in slices]
    start = min((event["ts"] for event in every), default=0)
    canvas = Figure(figsize=(12, 1.6 + 0.27 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for place, slices in enumerate(rows.values()):
        by_name = defaultdict(list)
        for event in slices:
            by_name[event["name"]].append(((event["ts"] - start) / 1e3, event["dur"] / 1e3))
        for name, spans in by_name.items():
            axes.broken_barh(spans, (place - 0.4, 0.8), color=COLORS.get(name, "tab:cyan"))
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(x=0.005)
    axes.set_xlabel("milliseconds")
    [title] = [e["args"]["name"] for e in events if e["name"] == "process_name" and e["pid"] == 1]
    axes.set_title(title)
    used = {event["name"] for event in every}
    patches = [Patch(color=color, label=name) for name, color in COLORS.items() if name in used]
    canvas.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    canvas.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a trace.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path, help="such as out.png or out.svg")
    args = parser.parse_args()
    draw(read(args.trace), args.picture)
