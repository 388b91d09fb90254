"""`sf-local bench` on a tiny model: what it reports, not how fast that is.

Figures that count tokens are the same on every machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sf_local.artifact.open import open_artifact
from sf_local.bench import measurements
from sf_local.bench.measurements import MEASUREMENTS
from sf_local.bench.report import Figure, check_plot, summary, table
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
from tests.support.tiny import SeeingModel, TinyModel


def test_bench(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", str(tiny.artifact), "--quick", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    assert report["artifact"] == str(tiny.artifact) and report["rounds"] == 1
    assert report["cpu"] and report["date"] and report["versions"]["shortfin"]
    figures = report["figures"]
    for name, figure in figures.items():
        assert name in out
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
        assert len(figure["values"]) == 1
    wanted = {name for name, figure in figures.items() if figure["wanted"]}
    for part in (
        "decode",
        "forks",
        "shared",
        "second turn",
        "gap",
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


def test_plot(tiny: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    assert main(["bench", "--vmfb", str(tiny.artifact), "--quick", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_mistakes(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = str(tiny.artifact)
    assert main(["bench", artifact, "--rounds", "0"]) == 1
    assert "rounds=0 must be" in capsys.readouterr().err
    for both in ([], [artifact, "--vmfb", artifact]):
        with pytest.raises(SystemExit):
            main(["bench", *both])
        assert "artifact" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", artifact, "--plot", "a.png"]) == 1
    assert (
        "plot='a.png' needs matplotlib: pip install \"sf-local[bench]\"" in capsys.readouterr().err
    )


@pytest.mark.parametrize("path", ["a.bmp", "nowhere/a.png"])
def test_plot_file(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    with pytest.raises(RequestError, match=r"must be a \.png"):
        check_plot(Path(path))


def test_table() -> None:
    figures = [Figure("speed", v, "tokens/s", ">= 2") for v in (1.0, 200.0, 3.0)]
    report = {"figures": summary(figures)}
    assert table(report).splitlines()[1] == "speed       3    1..200  tokens/s  >= 2"


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
