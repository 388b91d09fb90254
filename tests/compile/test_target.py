"""Targets: what is refused by name, and what each may use."""

from __future__ import annotations

import pytest

from compile import target as target_module
from compile.target import HIP_CHIPS, Vectors, resolve_target
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


def test_features_beyond_a_level() -> None:
    """Named as in /proc/cpuinfo or as LLVM does; the artifact names them as the former."""
    plain = resolve_target("cpu", "x86-64-v3")
    for name in ("avx_vnni", "avxvnni"):
        target = resolve_target("cpu", f"x86-64-v3+{name}")
        assert target.cpu_features == (*plain.cpu_features, "avx_vnni")
        assert target.vectors == Vectors(8, 4, has_int8_dot=True)
        assert any(flag.endswith(",+avxvnni") for flag in target.flags)
    tiles = resolve_target("cpu", "x86-64-v4+amx-bf16+amx_tile+avx512_vnni+avx512_bf16").vectors
    assert tiles is not None and tiles.has_tiles and tiles.has_int8_dot


@pytest.mark.parametrize(
    ("cpu", "told"),
    [
        ("x86-64-v3+avx512_vnni", "x86-64-v3 does not take avx512_vnni; .*x86-64-v3 .avx_vnni"),
        ("x86-64-v4+avx_vnni", "x86-64-v4 does not take avx_vnni"),
        ("generic+avx2+", "generic does not take avx2, ;"),
        ("host+avx_vnni", "'host.avx_vnni' is unknown; use one of host"),
    ],
)
def test_features_that_do_not_fit(cpu: str, told: str) -> None:
    with pytest.raises(UnsupportedError, match=told):
        resolve_target("cpu", cpu)


def test_a_host_with_both_kinds_of_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs AVX-512 anyway does not need AVX-VNNI as well, which some CPUs lack."""
    for host, expected in (
        ({"avx2", "avx_vnni"}, ("avx2", "avx_vnni")),
        ({"avx2", "avx512f", "avx512_vnni", "avx_vnni"}, ("avx2", "avx512f", "avx512_vnni")),
    ):
        monkeypatch.setattr(target_module, "host_cpu_features", lambda host=host: frozenset(host))
        assert resolve_target("cpu").cpu_features == expected


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
