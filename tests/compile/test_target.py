"""Targets: what is refused by name, and what each may use."""

from __future__ import annotations

import pytest

from compile.target import HIP_CHIPS, resolve_target
from sf_local.errors import UnsupportedError


@pytest.mark.parametrize("chip", HIP_CHIPS)
def test_chips(chip: str) -> None:
    target = resolve_target(chip)
    assert (target.device, target.vectors) == ("hip", None)
    assert f"--iree-hip-target={chip}" in target.flags


def test_cpu_levels() -> None:
    features = {
        level: resolve_target("cpu", level).cpu_features
        for level in ("generic", "x86-64-v3", "x86-64-v4")
    }
    assert features["generic"] == ()
    assert "avx2" in features["x86-64-v3"] and "avx512f" not in features["x86-64-v3"]
    assert set(features["x86-64-v4"]) - set(features["x86-64-v3"]) >= {"avx512f", "avx512vl"}
    vectors = [resolve_target("cpu", level).vectors for level in features]
    assert [v and (v.lanes, v.has_dot) for v in vectors] == [(4, False), (8, False), (16, False)]


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
