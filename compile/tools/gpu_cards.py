"""What cards with AMD GPUs do at most: their rates, and the cycles of instructions.

A unit is what a workgroup runs on, with its SIMDs and its LDS: a compute unit of CDNA, a workgroup
processor (two compute units) of RDNA. Sources:

- Units, clocks and bandwidths: AMD's product pages of the cards.
- Matrix instructions, and after how many cycles vector instructions can follow (CDNA: 4, but not
  before the end in f32; RDNA: not before the end): AMD's matrix instruction calculator,
  `matrix_calculator.py --detail-instruction`.
- Other instructions: LLVM's `llvm/lib/Target/AMDGPU/SISchedule.td` (SICommonWriteRes and
  SIDPGFX940FullSpeedModel in passes of 4 cycles, GFX11SpeedModel beyond the 5 cycles of the
  fastest), with the classes of instructions in `VOP1Instructions.td` to `VOP3Instructions.td`.
  f64 on RDNA: a 32nd of f32, by the documentation of rocprofiler-compute.
- LDS: 32 banks of 4 bytes a compute unit, by the instruction set references of CDNA3, RDNA3 and
  RDNA4.
- Registers: `getTotalNumVGPRs`, `getVGPRAllocGranule`, `getMaxWavesPerEU` in LLVM's
  `AMDGPUBaseInfo.cpp`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LAUNCH_SECONDS = 5e-6
MATRIX = ("v_mfma", "v_smfmac", "v_wmma", "v_swmmac")  # how names of matrix instructions begin


@dataclass(frozen=True)
class Cycles:
    """How long an instruction of a wave keeps each part of a SIMD from the next one.

    A matrix instruction keeps the vector part as long as no vector instruction can follow.
    """

    vector: int = 0
    matrix: int = 0
    transcendental: int = 0


@dataclass(frozen=True)
class Architecture:
    """What cards of one kind have in common. cycles: pattern of an instruction's name -> cycles of
    a wave of `lanes` threads; the first that matches holds."""

    lanes: int
    cycles: tuple[tuple[str, Cycles], ...]
    registers: int  # vector registers of a SIMD, for waves of `lanes` threads
    granule: int  # in which they are given to a wave
    max_waves: int  # that a SIMD holds
    lds_bytes: int  # of a unit
    lds_bandwidth: int  # bytes a cycle of a unit
    matrix_flops: int  # a cycle of a SIMD, in f16

    def cycles_of(self, name: str, lanes: int) -> Cycles:
        """Of an instruction of a wave of `lanes` threads; raises ValueError for a matrix
        instruction that is not in the table."""
        cycles = next((c for pattern, c in self.cycles if re.match(pattern, name)), Cycles())
        if name.startswith(MATRIX):
            if not cycles.matrix:
                raise ValueError(f"{name}: how many cycles does this take?")
            return cycles
        parts = lanes // self.lanes
        return Cycles(cycles.vector * parts, 0, cycles.transcendental * parts)


@dataclass(frozen=True)
class Card:
    """A card, at its highest clock."""

    name: str
    architecture: Architecture
    units: int
    simds: int  # of a unit
    clock: float  # cycles a second
    bandwidth: float  # bytes a second

    @property
    def flops(self) -> float:
        """Operations of matrix instructions a second, in f16."""
        return self.architecture.matrix_flops * self.simds * self.units * self.clock

    def waves(self, registers: int, lds: int, waves: int) -> int:
        """How many waves a SIMD holds, of workgroups of so many waves with `lds` bytes each."""
        have, granule = self.architecture, self.architecture.granule
        held = min(have.max_waves, have.registers // (-(-registers // granule) * granule))
        if lds:
            held = min(held, -(-(have.lds_bytes // lds * waves) // self.simds))
        return held


_TRANSCENDENTAL = r"v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f(16|32)"
_CONVERSION = r"v_cvt_(f32_([iu]32|f16|fp8|bf8)|[iu]32_f32|f16_f32|pk_f32_|pk_(fp8|bf8)_|sr_)"

CDNA3 = Architecture(
    64,
    (
        (r"v_mfma_\w+_16x16x(16|32)_", Cycles(4, 16)),
        (r"v_mfma_\w+_32x32x(8|16)_", Cycles(4, 32)),
        (r"v_mfma_f32_16x16x4_f32", Cycles(32, 32)),
        (r"v_mfma_f32_32x32x2_f32", Cycles(64, 64)),
        (_TRANSCENDENTAL, Cycles(16)),
        (_CONVERSION, Cycles(16)),
        (r"v_", Cycles(4)),
    ),
    registers=512, granule=8, max_waves=8, lds_bytes=65536, lds_bandwidth=128, matrix_flops=512,
)  # fmt: skip
_RDNA_VECTOR = (
    (_TRANSCENDENTAL, Cycles(1, 0, 4)),
    (r"v_(mul_lo_[iu]32|mul_hi_[iu]32|mad_[iu]64_[iu]32)", Cycles(4)),
    (r"v_cmpx?_\w+_[iu]64|v_\w+rev_[bi]64", Cycles(2)),
    (r"v_\w*f64", Cycles(32)),
    (r"v_", Cycles(1)),
)
RDNA3 = Architecture(
    32,
    ((r"v_wmma_i32_16x16x16_iu4", Cycles(16, 16)), (r"v_wmma", Cycles(32, 32)), *_RDNA_VECTOR),
    registers=1536, granule=24, max_waves=16, lds_bytes=131072, lds_bandwidth=256, matrix_flops=256,
)  # fmt: skip
RDNA4 = Architecture(
    32,
    ((r"v_wmma_\w+_(iu4|iu8|fp8|bf8)", Cycles(8, 8)), (r"v_wmma", Cycles(16, 16)), *_RDNA_VECTOR),
    registers=1536, granule=24, max_waves=16, lds_bytes=131072, lds_bandwidth=256, matrix_flops=512,
)  # fmt: skip

CARDS = {  # chip -> a card that has it
    "gfx942": Card("MI300X", CDNA3, 304, 4, 2.1e9, 5.3e12),
    "gfx1100": Card("RX 7900 XTX", RDNA3, 48, 4, 2.5e9, 960e9),
    "gfx1101": Card("RX 7800 XT", RDNA3, 30, 4, 2.43e9, 624e9),
    "gfx1200": Card("RX 9060 XT", RDNA4, 16, 4, 3.13e9, 320e9),
    "gfx1201": Card("RX 9070 XT", RDNA4, 32, 4, 2.97e9, 640e9),
}
