"""`sf-local bench` on a tiny model: what it reports, not how fast that is.

Figures that count tokens are the same on every machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sf_local.artifact.open import open_artifact
from sf_local.bench import measurements
from sf_local.bench.measurements import MEASUREMENTS
from sf_local.bench.report import Figure, check_plot, plot, summary, table
from sf_local.bench.roofline import (
    decode_bytes,
    encode_flops,
    peak_flops,
    prefill_flops,
    read_bandwidth,
)
from sf_local.cli import main
from sf_local.device.info import DeviceInfo
from sf_local.engine.kv_budget import GPU_SHARE
from sf_local.errors import DeviceError, RequestError
from tests.support.child import WITHOUT_SGLANG
from tests.support.tiny import SeeingModel, TinyModel


def test_bench(tiny: TinyModel, tmp_path: Path) -> None:
    """Also where sglang is not installed."""
    file, image = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--vmfb", tiny.artifact, "--quick", "--json", file]
    if find_spec("matplotlib"):
        options += ["--plot", image]
    program = f"{WITHOUT_SGLANG}\nfrom sf_local.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "bench", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    out, err = done.stdout, done.stderr
    assert "--plot" not in options or image.read_bytes().startswith(b"\x89PNG")
    report = json.loads(file.read_text())
    assert re.fullmatch(r".+, \d+ threads?", report["machine"]) and report["weights"] == "f32"
    assert re.search(r"^\d+ of \d+ bounds are met$", out, re.MULTILINE) and ".." not in out
    assert report["artifact"] == str(tiny.artifact) and report["rounds"] == 1
    assert report["cpu"] and report["date"] and report["versions"]["shortfin"]
    figures = report["figures"]
    for name, figure in figures.items():
        assert name in out
        assert figure["min"] <= figure["median"] <= figure["max"]
        assert figure["min"] > 0 or name.startswith("the same beside ")  # which is a difference
        assert len(figure["values"]) == 1
    wanted = {name for name, figure in figures.items() if figure["wanted"]}
    for part in (
        "decode",
        "forks",
        "shared",
        "second turn",
        "the same beside",
        "64 that share 160",
        "likeliest of 96",
        "that are cancelled",
        "waiting",
        "nodes",
        "peak memory",
        "idle",
        "16 rows / 1",
        "context 128 / 16",
        "64 tokens / 16",
    ):
        assert any(part in name for name in wanted)  # fmt: skip
    counts = {name: figure["median"] for name, figure in figures.items() if ": c" in name}
    assert counts == pytest.approx(dict.fromkeys(counts, 1), abs=0.05) and len(counts) == 3
    assert all(f": {measurement.__name__}\n" in err for measurement in MEASUREMENTS)


def test_pages_are_those_of_the_device(
    make_tiny: Callable[..., TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's memory counts, and the code for its chip, of an artifact for several."""
    model = make_tiny(target="gfx942,cpu", has_code=False)
    card = DeviceInfo("hip:0", "gfx942", "Card", 8 << 20)
    monkeypatch.setattr(DeviceInfo, "free_bytes", lambda _: 4 << 20)
    monkeypatch.setattr(DeviceInfo, "try_out", lambda *_: None)
    monkeypatch.setattr(measurements, "find_device", lambda *_: card)
    opened: dict[str, Any] = {}

    def engine(artifact: Path, device: str, **options: Any) -> None:
        opened.update(options)
        raise DeviceError("enough")

    monkeypatch.setattr(measurements, "Engine", engine)
    with pytest.raises(DeviceError, match="enough"):
        measurements.run(model.artifact, "hip")
    code = open_artifact(model.artifact, targets=["gfx942"])
    left = (4 << 20) - code.num_weight_bytes
    assert opened["kv_pages"] == int(left * GPU_SHARE) // code.config.page_bytes


@pytest.mark.parametrize("rounds", [1, 3])
def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Every text is inside of the picture and on no other, markers are inside of their axes, and
    only several rounds have a spread."""
    figures = pytest.importorskip("matplotlib.figure")
    canvases: list[Any] = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure,
        "savefig",
        lambda self, *a, **b: (canvases.append(self), save(self, *a, **b)),
    )
    plot(sample(rounds), tmp_path / "bench.png")
    [canvas] = canvases
    canvas.draw_without_rendering()  # which lays it out once more, for the dots it has by now
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    title = canvas.get_suptitle()
    assert title == "SmolLM2-135M-Instruct, bf16 weights\non AMD EPYC 9R45, 2 threads"
    *speeds, shares = canvas.axes
    for axes in speeds:
        [line] = axes.containers[0].lines[:1]
        assert axes.containers[0].has_yerr is (rounds > 1)
        assert_inside(
            axes.get_window_extent(), [axes.transData.transform(p) for p in line.get_xydata()]
        )
    texts = [canvas._suptitle, *shares.texts]
    for axes in canvas.axes:
        texts += [axes.title, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for box in boxes:
        assert_inside(canvas.bbox, [box.min, box.max], margin=0)
    for a, b in combinations(boxes, 2):
        assert not a.overlaps(b)


def assert_inside(box: Any, points: list[Any], margin: int = 5) -> None:
    """Points are in a box, at least so many pixels from its border."""
    for x, y in points:
        assert box.x0 + margin <= x <= box.x1 - margin
        assert box.y0 + margin <= y <= box.y1 - margin


def sample(rounds: int) -> dict[str, Any]:
    """A report such as that of a CPU, of a model with a name of usual length."""
    names = [f"prefill, {n} tokens" for n in (32, 128, 512, 2048)]
    names += [f"decode, {n} row{'s' * (n > 1)}" for n in (1, 2, 4, 8, 16)]
    names += [f"decode, context {n}" for n in (16, 512, 4096)]
    names += [f"prefill, {n} tokens: share of peak of avx512_bf16" for n in (512, 2048)]
    names += ["decode, 1 row: share of bandwidth"]
    figures = [
        Figure(name, value * (1 + 0.1 * number), "")
        for number in range(rounds)
        for name, value in zip(names, SPEEDS, strict=True)
    ]
    return {
        "rounds": rounds, "model": "SmolLM2-135M-Instruct", "weights": "bf16",
        "machine": "AMD EPYC 9R45, 2 threads", "figures": summary(figures),
    }  # fmt: skip


SPEEDS = (2202, 3252, 3417, 2571, 149, 292, 534, 892, 1273, 150, 140, 96, 90, 82, 79)


def test_mistakes(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = str(tiny.artifact)
    assert main(["bench", artifact, "--rounds", "0"]) == 1
    assert "--rounds 0 must be" in capsys.readouterr().err
    for both in ([], [artifact, "--vmfb", artifact]):
        with pytest.raises(SystemExit):
            main(["bench", *both])
        assert "artifact" in capsys.readouterr().err
    assert main(["bench", artifact, "--json", "nowhere/a.json"]) == 1
    assert "--json 'nowhere/a.json' must be a file in a folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", artifact, "--plot", "a.png"]) == 1
    message = "--plot 'a.png' needs matplotlib: pip install \"sf-local[bench]\""
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a.bmp", "nowhere/a.png"])
def test_plot_file(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    with pytest.raises(RequestError, match=r"must be a \.png"):
        check_plot(Path(path))


def test_table() -> None:
    figures = [Figure("speed", v, "tokens/s", ">= 2") for v in (1.0, 200.0, 3.0)]
    figures += [Figure("time", v, "ms", "< 1") for v in (1.0, 0.5, 2.0)]
    figures += [Figure("size", v, "MB") for v in (1.0, 2.0, -300.4)]
    assert table({"rounds": 3, "figures": summary(figures)}).splitlines() == [
        "       median  min..max  unit      wanted",
        "speed       3    1..200  tokens/s  >= 2    ok",
        "time        1    0.5..2  ms        < 1     MISSED",
        "size        1   -300..2  MB",
        "",
        "1 of 2 bounds are met",
    ]


def test_one_round_has_no_spread() -> None:
    report = {"rounds": 1, "figures": summary([Figure("speed", 3.0, "tokens/s")])}
    assert table(report).splitlines() == [
        "       median  unit      wanted",
        "speed       3  tokens/s",
    ]


@pytest.mark.parametrize(
    ("wanted", "value", "met"),
    [
        ("<= 1.5", 1.5, True), ("<= 1.5", 1.51, False), ("<= 1.5", 1.5004, True),  # shown as 1.5
        ("< 5", 5.0, False), (">= 0.99", 0.99, True), ("> 2", 2.0, False), ("", 2.0, None),
    ],
)  # fmt: skip
def test_bounds(wanted: str, value: float, met: bool | None) -> None:
    assert summary([Figure("a", value, "", wanted)])["a"]["met"] is met


def test_model_costs(tiny: TinyModel) -> None:
    """Against a count by hand: 2 layers of 48 features, 72 inside, 6 and 2 heads of 8, f32."""
    artifact = open_artifact(tiny.artifact)
    layer = 48 * (48 + 2 * 16) + 48 * 48 + 3 * 48 * 72
    least = 2 * (10 * 2 * layer + 300 * 48 + 2 * 48 * 10**2)
    assert least <= prefill_flops(artifact, 10) <= 1.5 * least  # blocks are padded
    weights = 4 * (2 * layer + 300 * 48 + 5 * 48)
    assert weights <= decode_bytes(artifact, 0) <= 1.5 * weights
    grown = decode_bytes(artifact, 3) - decode_bytes(artifact, 0)
    assert grown == 3 * 2 * 2 * 2 * 8 * 4  # tokens, layers, K and V, heads, head size, bytes


def test_a_tower_costs(tiny: TinyModel, make_seeing: Callable[..., SeeingModel]) -> None:
    """Against a count by hand: 3 layers of 64 features, 72 inside, 16 patches of 8 x 8 pixels."""
    layer = 4 * 64 * 64 + 2 * 64 * 72
    attention = 2 * 64 * 16**2
    least = 2 * (3 * (16 * layer + attention) + 16 * 64 * 192 + 4 * 48 * 256)
    artifact = open_artifact(make_seeing("idefics3").artifact)
    assert least <= encode_flops(artifact) <= 1.5 * least  # blocks are padded
    attention = 2 * 64 * 17**2  # and a class token
    least = 2 * (3 * (17 * layer + attention) + 16 * (64 * 192 + 48 * 64 + 48 * 48))
    assert least <= encode_flops(open_artifact(make_seeing("llava").artifact)) <= 1.5 * least
    text = open_artifact(tiny.artifact)
    assert prefill_flops(artifact, 10) == prefill_flops(text, 10)
    assert decode_bytes(artifact, 10) == decode_bytes(text, 10)


def test_probes() -> None:
    assert 1e9 < read_bandwidth() < 1e13
    for dtype in ("f32", "bf16", "int4"):
        assert 1e9 < peak_flops(dtype).flops < 1e16
