"""Ways through kernels that are written by hand, counted on paper."""

from __future__ import annotations

import pytest

from compile.tools import gpu_walk
from compile.tools.gpu_walk import walk
from tests.support.assembly import kernel, loop

FROM_ARGUMENT = """
	s_load_b32 s3, s[0:1], 0x18
	s_mov_b32 s2, 0
.LBB0_1:
	v_add_f32_e32 v1, v1, v1
	s_addk_i32 s2, 0x40
	s_waitcnt lgkmcnt(0)
	s_cmp_lt_u32 s2, s3
	s_cbranch_scc1 .LBB0_1
"""
FROM_BELOW_ZERO = """
	s_movk_i32 s2, 0xff00
	s_movk_i32 s3, 0x500
.LBB0_1:
	v_add_f32_e32 v1, v1, v1
	s_addk_i32 s2, 0x100
	s_addk_i32 s3, 0xff00
	s_cmpk_lt_u32 s2, 0xf00
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	s_addk_i32 s3, 0x100
	s_cmpk_lg_i32 s3, 0xff00
	s_cbranch_scc1 .LBB0_2
"""
AS_CARRY = """
	v_mov_b32_e32 v2, 0xfffffd00
.LBB0_1:
	v_add_co_u32 v2, s6, 0x100, v2
	s_and_b32 vcc_lo, exec_lo, s6
	v_add_f32_e32 v1, v1, v1
	s_cbranch_vccz .LBB0_1
"""
OF_LANES = """
	v_and_b32_e32 v2, 3, v0
	s_mov_b32 s4, 0
.LBB0_1:
	v_add_f32_e32 v1, v1, v1
	v_cmp_eq_u32_e32 vcc_lo, 0, v2
	v_subrev_nc_u32_e32 v2, 1, v2
	s_or_b32 s4, vcc_lo, s4
	s_and_not1_b32 exec_lo, exec_lo, s4
	s_cbranch_execnz .LBB0_1
"""
TESTED_FIRST = """
	s_movk_i32 s2, 0x500
.LBB0_1:
	s_cmp_eq_u32 s2, 0
	s_cbranch_scc1 .LBB0_2
	v_add_f32_e32 v1, v1, v1
	s_sub_i32 s2, s2, 0x80
	s_branch .LBB0_1
.LBB0_2:
"""
NESTED = """
	s_mov_b32 s3, 4
.LBB0_2:
""" + loop("\tv_add_f32_e32 v1, v1, v1", 5) + """
	s_add_i32 s3, s3, -2
	s_cmp_lg_u32 s3, 0
	s_cbranch_scc1 .LBB0_2
"""  # fmt: skip
LOADED = """
	s_load_b64 s[4:5], s[0:1], 0x0
	s_load_b32 s3, s[4:5], 0x0
""" + FROM_ARGUMENT.replace("s_load_b32 s3, s[0:1], 0x18", "s_nop 0")
LOADED_AND_TESTED_FIRST = (
    LOADED.partition("\ts_nop")[0]
    + """
.LBB0_1:
	s_cmp_eq_u32 s3, 0
	s_cbranch_scc1 .LBB0_2
	v_add_f32_e32 v1, v1, v1
	s_sub_i32 s3, s3, 1
	s_branch .LBB0_1
.LBB0_2:
"""
)


def additions(body: str, arguments: dict[int, int], lanes: int = 32) -> tuple[int, int | None]:
    """How often the additions are executed, and the inner loop gone through."""
    code = kernel(body, lanes=lanes)
    way = walk(code, arguments, range(lanes))
    counts = [
        count for count, instruction in zip(way.counts, code.instructions, strict=True)
        if instruction.name == "v_add_f32"
    ]  # fmt: skip
    return sum(counts), way.times(code.inner_loops[0]) if code.inner_loops else 0


@pytest.mark.parametrize(
    ("body", "times"),
    [
        (loop("\tv_add_f32_e32 v1, v1, v1", 16), 16),
        (FROM_ARGUMENT, 9),
        (FROM_BELOW_ZERO, 16),
        (AS_CARRY, 3),
        (OF_LANES, 4),
        (NESTED, 10),
    ],
)
def test_a_loop(body: str, times: int) -> None:
    assert additions(body, {0x18: 576}) == (times, times)


def test_a_loop_that_is_tested_first() -> None:
    """Its head is executed once more."""
    assert additions(TESTED_FIRST, {}) == (10, 11)


@pytest.mark.parametrize("body", [LOADED, LOADED_AND_TESTED_FIRST])
def test_a_loop_whose_end_is_loaded_from_memory(body: str) -> None:
    """It is gone through once, and said to be unknown."""
    assert additions(body, {0x18: 576}) == (1, None)


def test_an_argument_that_is_not_known() -> None:
    assert additions(FROM_ARGUMENT, {}) == (1, None)


@pytest.mark.parametrize(
    ("condition", "executed"),
    [
        ("v_cmpx_gt_u32_e32 40, v0", 1),
        ("v_cmpx_eq_u32_e32 3, v0", 1),
        ("v_cmpx_lt_u32_e32 40, v0", 0),
        ("v_cmpx_lt_f32_e32 0, v3", 1),
    ],
)
def test_what_only_some_lanes_execute(condition: str, executed: int) -> None:
    body = f"""
	{condition}
	s_cbranch_execz .LBB0_1
	v_add_f32_e32 v1, v1, v1
.LBB0_1:
"""
    assert additions(body, {}) == (executed, 0)


def test_a_wave_of_64() -> None:
    """Masks are pairs of registers."""
    body = """
	v_cmp_lt_u32_e32 vcc, 40, v0
	s_and_saveexec_b64 s[2:3], vcc
	s_cbranch_execz .LBB0_1
	v_add_f32_e32 v1, v1, v1
.LBB0_1:
	s_or_b64 exec, exec, s[2:3]
"""
    assert additions(body, {}, lanes=64) == (1, 0)
    assert additions(body.replace("40", "64"), {}, lanes=64) == (0, 0)


def test_a_wave_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_walk, "MOST_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1000 instructions"):
        additions(loop("\ts_mov_b32 s2, 0", 2), {})
