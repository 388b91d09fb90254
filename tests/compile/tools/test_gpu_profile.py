"""Loops written by hand: what they do, and the least time on cards, worked out on paper."""

from __future__ import annotations

import pytest

from compile.tools.gpu_cards import CARDS, Cycles
from compile.tools.gpu_profile import Profile, bound, profile
from tests.support.assembly import kernel, loop

CHIPS = ("gfx942", "gfx1100", "gfx1201")
MFMA = "\tv_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]\n"
MFMA_F32 = "\tv_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]\n"
WMMA = "\tv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]\n"
FMA = "\tv_fma_f32 v9, v9, v9, v9\n"
EXP = "\tv_exp_f32_e32 v9, v9\n"
CVT = "\tv_cvt_f32_f16_e32 v9, v9\n"
MUL = "\tv_mul_lo_u32 v9, v9, v9\n"
DUAL = "\tv_dual_add_f32 v9, v9, v9 :: v_dual_mov_b32 v8, v7\n"
DUAL_FMAC = "\tv_dual_fmac_f32 v0, v1, v2 :: v_dual_fmac_f32 v3, v4, v5\n"
TIMES = 100


def of_loop(chip: str, body: str, threads: int | None = None) -> Profile:
    """A kernel that is a loop of TIMES times. threads: of a workgroup; by default one wave."""
    lanes = CARDS[chip].architecture.lanes
    code = kernel(loop(body, TIMES), lanes=lanes)
    return profile(code, {}, (threads or lanes, 1, 1), CARDS[chip].architecture)


@pytest.mark.parametrize(
    ("chip", "body", "cycles"),
    [
        # A vector instruction has 4 cycles on CDNA, 1 on RDNA.
        ("gfx942", 10 * FMA, 40), ("gfx1100", 10 * FMA, 10), ("gfx1201", 10 * FMA, 10),
        # 8 x 16 of matrices, of which vector instructions cannot have 8 x 4.
        ("gfx942", 8 * MFMA + 16 * FMA, 128), ("gfx942", 8 * MFMA + 40 * FMA, 8 * 4 + 160),
        # In f32 nothing goes on beside them.
        ("gfx942", 8 * MFMA_F32 + 16 * FMA, 8 * 32 + 64),
        # Nor does on RDNA.
        ("gfx1100", 8 * WMMA + 16 * FMA, 8 * 32 + 16),
        ("gfx1201", 8 * WMMA + 16 * FMA, 8 * 16 + 16),
        # A quarter as many exponentials; on RDNA beside others: max(4 + 2, 8), max(9 + 2, 8).
        ("gfx942", 2 * EXP + 4 * FMA, 2 * 16 + 16), ("gfx1100", 2 * EXP + 4 * FMA, 8),
        ("gfx1100", 2 * EXP + 9 * FMA, 11),
        ("gfx942", 3 * CVT, 48), ("gfx1100", 3 * CVT, 3), ("gfx942", 3 * MUL, 12),
        ("gfx1201", 3 * MUL, 12), ("gfx1100", 5 * DUAL, 5),
    ],
)  # fmt: skip
def test_issue(chip: str, body: str, cycles: int) -> None:
    found = of_loop(chip, body)
    [inner] = found.loops
    assert inner.times == TIMES
    assert inner.work.cycles == cycles
    assert found.work.cycles == found.longest == TIMES * cycles


def test_what_a_loop_does() -> None:
    body = (
        "\tbuffer_load_b128 v[0:3], v4, s[4:7], 0 offen\n" * 3
        + "\tglobal_load_u16 v5, v4, s[4:5]\n\ts_barrier\n"
        + "\tds_load_b128 v[0:3], v4\n\tds_store_2addr_b64 v4, v[0:1], v[2:3] offset1:1\n"
        + 2 * WMMA + 7 * FMA + "\tbuffer_store_b32 v4, v5, s[4:7], 0 offen\n"
    )  # fmt: skip
    found = of_loop("gfx1100", body, threads=96)
    work = found.loops[0].work
    assert work.loads == {16: 3, 2: 1}
    assert work.load_bytes == 50
    assert (work.vector, work.matrix, work.barriers) == (7, 2, 1)
    assert work.lds_bytes == 32 * (16 + 16)
    assert found.waves == 3
    assert found.work.loads == {16: 3 * 3 * TIMES, 2: 3 * TIMES}
    assert found.work.barriers == TIMES  # each wave comes to the same ones


def test_bound_by_memory() -> None:
    """4,096 workgroups of a wave that loads 4 x 16 bytes a lane 100 times, and multiplies 32 times.

    86 workgroups are on the unit that has most, on each of its 4 SIMDs 100 x 32 cycles of each
    fourth."""
    found = of_loop("gfx1100", 4 * "\tbuffer_load_b128 v[0:3], v4, s[4:7], 0 offen\n" + 32 * FMA)
    num_bytes = 4096 * 32 * 100 * 4 * 16
    least = bound(found, 4096, num_bytes, CARDS["gfx1100"])
    assert least.memory == pytest.approx(num_bytes / 960e9) == pytest.approx(873.8e-6, 1e-3)
    assert least.issue == pytest.approx(86 * 3200 / 4 / 2.5e9)
    assert (least.limit, least.seconds) == ("memory", least.memory)


@pytest.mark.parametrize(("chip", "seconds"), [
    ("gfx942", 10 * 100 * 4 * 64 * 16 / 128 / 2.1e9),  # 10 of 3,040 workgroups on each of 304
    ("gfx1100", 64 * 100 * 4 * 32 * 16 / 256 / 2.5e9),  # 63.3, on 48 pairs of compute units
    ("gfx1201", 95 * 100 * 4 * 32 * 16 / 256 / 2.97e9),
])  # fmt: skip
def test_bound_by_lds(chip: str, seconds: float) -> None:
    read = "ds_read_b128" if chip == "gfx942" else "ds_load_b128"
    least = bound(of_loop(chip, 4 * f"\t{read} v[0:3], v4\n" + FMA), 3040, 1000, CARDS[chip])
    assert least.lds == pytest.approx(seconds)
    assert (least.limit, least.seconds) == ("lds", least.lds)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_single_wave_is_not_shared_by_simds(chip: str) -> None:
    card = CARDS[chip]
    cycles = TIMES * 10 * (4 if chip == "gfx942" else 1)
    least = bound(of_loop(chip, 10 * FMA), 1, 1000, card)
    assert (least.limit, least.issue) == ("issue", pytest.approx(cycles / card.clock))


def test_a_loop_of_unknown_length() -> None:
    body = loop(FMA, 9).replace("s_cmp_lt_u32 s2, 9", "s_cmp_lt_u32 s2, s9")
    found = profile(kernel(body), {}, (32, 1, 1), CARDS["gfx1100"].architecture)
    assert found.has_unknown
    assert found.loops[0].times is None


@pytest.mark.parametrize(
    ("chip", "instruction", "operations", "published"),
    [
        ("gfx942", MFMA, 2 * 16**3, 1307.4e12), ("gfx1100", WMMA, 2 * 16**3, 122.8e12),
        ("gfx1201", WMMA, 2 * 16**3, 195e12), ("gfx942", MFMA_F32, 2 * 16 * 16 * 4, 163.4e12),
        ("gfx942", "\tv_pk_fma_f32 v[0:1], v[0:1], v[0:1], v[0:1]\n", 4 * 64, 163.4e12),
        ("gfx1100", DUAL_FMAC, 4 * 32, 61.4e12), ("gfx1201", DUAL_FMAC, 4 * 32, 48.7e12),
    ],
)  # fmt: skip
def test_peaks_that_amd_publishes(
    chip: str, instruction: str, operations: int, published: float
) -> None:
    card = CARDS[chip]
    rate = operations * TIMES / of_loop(chip, instruction).work.cycles
    assert rate * card.simds * card.units * card.clock == pytest.approx(published, rel=5e-3)
    if operations == 2 * 16**3:
        assert card.flops == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize(
    ("chip", "registers", "lds", "waves", "held"),
    [
        ("gfx942", 64, 0, 4, 8), ("gfx942", 65, 0, 4, 7), ("gfx942", 512, 0, 4, 1),
        ("gfx942", 64, 17408, 4, 3), ("gfx942", 64, 33000, 4, 1),
        ("gfx1100", 96, 0, 4, 16), ("gfx1100", 97, 0, 4, 12), ("gfx1100", 256, 0, 4, 5),
        ("gfx1100", 96, 33792, 4, 3), ("gfx1201", 96, 66000, 8, 2),
    ],
)  # fmt: skip
def test_waves_that_a_simd_holds(
    chip: str, registers: int, lds: int, waves: int, held: int
) -> None:
    """Of gfx942's 512 registers each wave gets a multiple of 8, of gfx11's and 12's 1,536 one of
    24; a workgroup's waves share its LDS."""
    assert CARDS[chip].waves(registers, lds, waves) == held


def test_a_matrix_instruction_that_is_not_in_the_table() -> None:
    architecture = CARDS["gfx942"].architecture
    assert architecture.cycles_of("v_mfma_f32_32x32x8_f16", 64) == Cycles(4, 32)
    with pytest.raises(ValueError, match="v_mfma_f64_16x16x4_f64: how many cycles"):
        architecture.cycles_of("v_mfma_f64_16x16x4_f64", 64)
