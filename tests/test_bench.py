"""`sf-local bench` on a tiny model: what it reports, not how fast that is.

Figures that count tokens are the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TinyModel

from sf_local.bench import MEASUREMENTS
from sf_local.cli import main


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
    for part in ("decode", "forks", "shared", "second turn", "gap", "waiting", "nodes"):
        assert any(part in name for name in wanted)
    counts = {name: figure["median"] for name, figure in figures.items() if ": c" in name}
    assert counts == pytest.approx(dict.fromkeys(counts, 1), abs=0.05) and len(counts) == 3
    assert all(f": {measurement.__name__}\n" in err for measurement in MEASUREMENTS)


def test_no_rounds(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny.artifact), "--rounds", "0"]) == 1
    assert "rounds=0 must be" in capsys.readouterr().err
