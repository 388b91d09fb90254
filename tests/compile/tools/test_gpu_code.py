"""Assembly as the compiler writes it: instructions, what they move, and loops."""

from __future__ import annotations

import pytest

from compile.tools.gpu_code import instruction
from tests.support.assembly import kernel, loop


@pytest.mark.parametrize(
    ("line", "name", "operands"),
    [
        ("v_add_f32_e32 v2, 0, v2", "v_add_f32", ("v2", "0", "v2")),
        ("buffer_load_b128 v[0:3], v4, s[4:7], 0 offen offset:16", "buffer_load_b128",
         ("v[0:3]", "v4", "s[4:7]", "0")),
        ("v_add_f32_dpp v2, v2, v2 quad_perm:[1,0,3,2] row_mask:0xf", "v_add_f32_dpp",
         ("v2", "v2", "v2")),
        ("s_endpgm", "s_endpgm", ()),
    ],
)  # fmt: skip
def test_an_instruction(line: str, name: str, operands: tuple[str, ...]) -> None:
    found = instruction(line)
    assert (found.name, found.operands, found.pair) == (name, operands, None)


def test_two_that_are_issued_together() -> None:
    first = instruction("v_dual_mov_b32 v1, s16 :: v_dual_add_f32 v5, 0, v5")
    assert first.operands == ("v1", "s16")
    assert first.pair and first.pair.name == "v_dual_add_f32"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("buffer_load_dwordx4", 16), ("global_load_b96", 12), ("buffer_load_ushort", 2),
        ("global_load_d16_hi_b16", 2), ("buffer_load_sbyte_d16", 1), ("global_load_u8", 1),
        ("flat_load_dword", 4), ("global_store_dwordx2", 8), ("ds_read2_b64", 16),
        ("ds_load_2addr_b32", 8), ("ds_read2st64_b32", 8), ("ds_write_b128", 16),
        ("ds_store_2addr_stride64_b64", 16), ("ds_bpermute_b32", 4), ("ds_load_u16_d16_hi", 2),
        ("v_add_f32", 0), ("s_load_b128", 0),
    ],
)  # fmt: skip
def test_bytes_of_a_lane(name: str, size: int) -> None:
    assert instruction(f"{name} v0, v1").lane_bytes == size


def test_a_loop() -> None:
    code = kernel("\tv_mov_b32_e32 v1, 0\n" + loop("\tv_add_f32_e32 v1, v1, v1", 9))
    [found] = code.loops
    assert (found.head, found.body) == (2, frozenset(range(2, 6)))


def test_a_loop_that_falls_back_to_its_head() -> None:
    """The compiler may put the end of a loop before its head."""
    code = kernel("""
	s_branch .LBB0_2
.LBB0_1:
	s_cmp_lt_u32 s3, s2
	s_cbranch_scc0 .LBB0_3
.LBB0_2:
	s_add_i32 s2, s2, 1
	s_branch .LBB0_1
.LBB0_3:
""")
    [found] = code.loops
    assert found.head in (1, 3) and found.body == frozenset(range(1, 5))


def test_inner_loops() -> None:
    code = kernel("""
	s_mov_b32 s2, 0
.LBB0_1:
	s_mov_b32 s3, 0
.LBB0_2:
	s_add_i32 s3, s3, 1
	s_cmp_lt_u32 s3, 5
	s_cbranch_scc1 .LBB0_2
	s_add_i32 s2, s2, 1
	s_cmp_lt_u32 s2, 3
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_3:
""")
    outer, inner = code.loops
    assert (outer.head, inner.head) == (1, 2)
    assert code.inner_loops == (inner,)


def test_resources() -> None:
    code = kernel("", lanes=64, vgprs=40, lds=1024)
    assert code.lanes == 64
    assert code.resources["next_free_vgpr"] == 40
    assert code.resources["group_segment_fixed_size"] == 1024
    assert code.resources["num_vgpr"] == 33


def test_arguments_that_hardware_loads() -> None:
    """Their loads stand before the entry that hardware takes."""
    prologue = "\ts_load_dword s2, s[0:1], 0x0\n\ts_branch .LBB0_0\n\t.p2align\t8\n.LBB0_0:\n"
    code = kernel(prologue + "\tv_mov_b32_e32 v1, 0\n" + loop("", 2))
    assert [found.name for found in code.instructions[:2]] == ["v_mov_b32", "s_mov_b32"]
    assert code.labels[".LBB0_0"] == 0
