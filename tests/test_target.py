"""Targets: what is refused by name, and what each layout pads."""

from __future__ import annotations

import pytest

from compile.target import HIP_CHIPS, ROW_MAJOR, Layout, resolve_target
from sf_local.errors import UnsupportedError


def test_packed_layout_pads_to_tiles() -> None:
    layout = Layout(True, 16, 16, 2)
    assert layout.shape(33, 48) == (3, 24, 16, 2)
    assert layout.matrix_size((3, 24, 16, 2)) == (48, 48)
    assert [layout.pad(n) for n in (1, 16, 17)] == [16, 16, 32]
    assert [layout.row_tile(page) for page in (8, 16, 64)] == [8, 16, 16]


def test_row_major_layout_pads_nothing() -> None:
    assert ROW_MAJOR.shape(33, 47) == ROW_MAJOR.matrix_size((33, 47)) == (33, 47)
    assert (ROW_MAJOR.pad(33), ROW_MAJOR.row_tile(16)) == (33, 1)


@pytest.mark.parametrize("chip", HIP_CHIPS)
def test_chips(chip: str) -> None:
    target = resolve_target(chip)
    assert (target.device, target.layout("f16")) == ("hip", ROW_MAJOR)
    assert f"--iree-hip-target={chip}" in target.flags


def test_cpu_levels() -> None:
    features = {
        level: resolve_target("cpu", level).cpu_features
        for level in ("generic", "x86-64-v3", "x86-64-v4")
    }
    assert features["generic"] == ()
    assert "avx2" in features["x86-64-v3"] and "avx512f" not in features["x86-64-v3"]
    assert set(features["x86-64-v4"]) - set(features["x86-64-v3"]) >= {"avx512f", "avx512vl"}
    assert resolve_target("cpu", "x86-64-v4").layout("bf16") == Layout(True, 16, 16, 2)
    assert resolve_target("cpu", "x86-64-v3").layout("f16") == Layout(True, 8, 8, 1)
    assert resolve_target("cpu", "generic").layout("f32") == Layout(True, 8, 4, 1)


def test_default_weights() -> None:
    """bf16 only where the CPU multiplies it; none of the portable levels does."""
    levels = {"generic": "f32", "x86-64-v3": "f16", "x86-64-v4": "f16"}
    assert {level: resolve_target("cpu", level).weight_dtype for level in levels} == levels
    assert resolve_target("gfx942").weight_dtype == "f16"


@pytest.mark.parametrize("name", ["gfx1030", "gfx1150", "gfx1151", "gfx803"])
def test_chips_the_compiler_does_not_know(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name}.*it knows gfx908"):
        resolve_target(name)


@pytest.mark.parametrize(("name", "cpu"), [("cuda", "host"), ("", "host"), ("cpu", "avx9")])
def test_unknown_targets(name: str, cpu: str) -> None:
    with pytest.raises(UnsupportedError, match="is unknown"):
        resolve_target(name, cpu)
