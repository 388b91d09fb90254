"""What instructions leave in registers, worked out on paper by AMD's references."""

from __future__ import annotations

import pytest

from compile.tools.gpu_registers import ARGUMENTS, Registers
from tests.support.assembly import kernel

LANES = 32
MASK = 0xFFFFFFFF


def after(body: str, arguments: dict[int, int] | None = None, threads: int = LANES) -> Registers:
    """The registers of the first wave, v0 being the lane's number."""
    code = kernel(body, lanes=LANES)
    registers = Registers(code, arguments or {}, range(threads))
    for instruction in code.instructions:
        registers.execute(instruction)
    return registers


@pytest.mark.parametrize(
    ("body", "register", "value"),
    [
        # Sums of 64 bits: the carry goes from one half to the other, and a borrow
        ("s_mov_b32 s2, -1\n s_add_u32 s2, s2, 3\n s_addc_u32 s3, 5, 0", "s[2:3]", 6 << 32 | 2),
        ("s_mov_b32 s2, 1\n s_sub_u32 s2, s2, 3\n s_subb_u32 s3, 5, 0", "s3", 4),
        ("s_mov_b32 s2, -1\n s_add_u32 s2, s2, 3\n s_addc_u32 s3, -1, 0", "scc", 1),
        ("s_add_u32 s2, s9, 3\n s_addc_u32 s3, 5, 0", "s3", None),
        # Of signed numbers, scc is overflow
        ("s_mov_b32 s2, 0x7fffffff\n s_add_i32 s2, s2, 1", "scc", 1),
        ("s_mov_b32 s2, -1\n s_add_i32 s2, s2, 1", "scc", 0),
        ("s_min_i32 s2, -4, 3", "s2", MASK - 3), ("s_min_i32 s2, -4, 3", "scc", 1),
        ("s_max_u32 s2, 4, 9", "s2", 9), ("s_max_u32 s2, 4, 9", "scc", 0),
        ("v_med3_i32 v1, 9, -4, 7\n v_readfirstlane_b32 s2, v1", "s2", 7),
        ("s_and_b32 s2, 12, 3", "scc", 0), ("s_or_b32 s2, 12, 3", "scc", 1),
        ("s_cmp_eq_u32 s9, 3", "scc", None),
        # What is chosen
        ("s_cmp_eq_u32 3, 3\n s_cselect_b32 s2, 7, 8", "s2", 7),
        ("s_cmp_lg_u32 3, 3\n s_cselect_b32 s2, 7, 8", "s2", 8),
        ("s_cmp_eq_u32 s9, 3\n s_cselect_b32 s2, 7, 8", "s2", None),
        # Fields of 16 bits, and constants
        ("s_movk_i32 s2, 0xfff0\n s_mulk_i32 s2, 0x3", "s2", MASK - 47),
        ("s_mov_b32 s2, 0xabcd\n s_bfe_u32 s2, s2, 0x80004", "s2", 0xBC),
        ("s_mov_b64 s[2:3], -2", "s[2:3]", 2**64 - 2),
        ("s_mov_b32 s2, 5\n s_bitcmp1_b32 s2, 0", "scc", None),  # not computed
        ("s_mov_b32 s2, 5\n s_mov_b32 s2, vmcnt", "s2", None),  # no register
        ("s_mov_b32 s2, 5\n s_getpc_b64 s[2:3]", "s2", None),
        # The lowest active lane
        ("v_add_nc_u32_e32 v1, 9, v0\n v_readfirstlane_b32 s2, v1", "s2", 9),
        ("v_cmpx_lt_u32_e32 4, v0\n v_readfirstlane_b32 s2, v0", "s2", 5),
        ("v_cmpx_lt_u32_e32 40, v0\n v_readfirstlane_b32 s2, v0", "s2", 0),  # of none, lane 0
        ("s_mov_b32 exec_lo, s9\n v_readfirstlane_b32 s2, v0", "s2", None),
        # Masks
        ("v_cmp_gt_u32_e64 s2, 3, v0", "s2", 7),
        ("s_mov_b32 s2, 6\n s_and_saveexec_b32 s3, s2", "exec_lo", 6),
        ("s_mov_b32 s2, 6\n s_and_saveexec_b32 s3, s2", "s3", MASK),
        ("s_mov_b32 s2, 0\n s_and_saveexec_b32 s3, s2", "scc", 0),
        ("s_and_saveexec_b32 s3, s9", "exec_lo", None),
        ("s_mov_b32 exec_lo, s9\n v_cmp_gt_u32_e64 s2, 3, v0", "s2", None),
        ("v_mov_b32_e32 v1, -1\n v_add_co_u32 v1, s2, v1, v0", "s2", MASK - 1),  # all but lane 0
        ("s_mov_b32 vcc_lo, 7\n v_cmp_lt_f32_e32 vcc_lo, 0, v0", "vcc_lo", None),
        ("v_cmpx_lt_f32_e32 0, v0", "exec_lo", None),
    ],
)  # fmt: skip
def test_a_scalar(body: str, register: str, value: int | None) -> None:
    assert after(body).scalar(register) == value


@pytest.mark.parametrize(
    ("body", "lanes"),
    [
        ("v_mov_b32_e32 v1, 5\n v_mov_b32_e32 v2, 6\n s_mov_b32 vcc_lo, 2\n "
         "v_cndmask_b32_e32 v1, v1, v2, vcc_lo", [5, 6, 5, 5]),
        ("s_mov_b32 s2, 6\n v_cndmask_b32_e64 v1, 3, 4, s2", [3, 4, 4, 3]),
        ("v_cndmask_b32_e64 v1, 3, 4, s9", [None] * 4),  # nothing is known of s9
        ("v_cndmask_b32_e64 v1, 3, 3, s9", [3] * 4),
        ("v_mov_b32_e32 v1, 5\n v_cmpx_lt_u32_e32 1, v0\n v_mov_b32_e32 v1, 6", [5, 5, 6, 6]),
        ("v_mov_b32_e32 v1, 5\n s_mov_b32 exec_lo, s9\n v_mov_b32_e32 v1, 6", [None] * 4),
        ("v_mov_b32_e32 v1, 5\n v_add_co_ci_u32_e32 v1, vcc_lo, v1, v0, vcc_lo", [None] * 4),
        ("v_dual_mov_b32 v1, v0 :: v_dual_mov_b32 v2, v1", [0, 1, 2, 3]),
        ("v_lshl_add_u32 v1, v0, 2, 1", [1, 5, 9, 13]),
        ("v_mad_u32_u24 v1, v0, 3, 7", [7, 10, 13, 16]),
        ("v_mov_b32_e32 v1, 5\n v_cvt_f32_u32_e32 v1, v0", [None] * 4),
    ],
)  # fmt: skip
def test_lanes(body: str, lanes: list[int | None]) -> None:
    assert after(body).lanes("v1")[:4] == lanes


def test_two_that_are_issued_together_read_what_was_before() -> None:
    registers = after("v_mov_b32_e32 v1, 5\n v_dual_mov_b32 v1, v0 :: v_dual_mov_b32 v2, v1")
    assert registers.lanes("v1")[:3] == [0, 1, 2] and registers.lanes("v2")[:3] == [5, 5, 5]


def test_arguments() -> None:
    """Those that are loaded, and of other memory nothing; lanes that have no thread are idle."""
    body = "s_load_b64 s[4:5], s[0:1], 0x8\n s_load_b32 s6, s[4:5], 0x0\n s_load_b32 s7, s[0:1], s9"
    registers = after(body, {8: 11, 12: 3}, threads=20)
    assert registers.scalar("s[0:1]") == ARGUMENTS
    assert registers.scalar("s[4:5]") == 3 << 32 | 11
    assert registers.scalar("s6") is None and registers.scalar("s7") is None
    assert registers.scalar("exec_lo") == (1 << 20) - 1
    assert registers.lanes("v0")[18:22] == [18, 19, None, None]


def test_arguments_that_are_there_from_the_start() -> None:
    code = kernel("s_nop 0")
    code.resources["user_sgpr_kernarg_preload_length"] = 3
    registers = Registers(code, {0: 5, 8: 7}, range(LANES))
    assert [registers.scalar(f"s{k}") for k in (12, 13, 14, 15)] == [5, None, 7, 0]
