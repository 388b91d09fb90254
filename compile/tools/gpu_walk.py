"""The way of a wave through a kernel: how often it comes by each instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compile.tools.gpu_code import Code, Loop
from compile.tools.gpu_registers import Registers

MOST_STEPS = 200_000  # of a wave, before it is given up


@dataclass
class Way:
    """counts: how often each instruction is executed. unknown: first instructions of loops of which
    it cannot be told how often they are gone through; they were gone through once."""

    counts: list[int]
    unknown: set[int] = field(default_factory=set)

    def times(self, loop: Loop) -> int | None:
        """How often the wave goes through a loop, in all; None if that cannot be told."""
        return None if loop.head in self.unknown else self.counts[loop.head]


def walk(code: Code, arguments: Mapping[int, int], threads: Sequence[int]) -> Way:
    """The way of a wave of the first workgroup.

    arguments: byte offset -> 32 bits of the kernel's arguments, as far as they are known. threads:
    the numbers of the wave's threads as the hardware packs them, x | y << 10 | z << 20. Raises
    ValueError for a wave that does not end.
    """
    wave = _Wave(code, arguments, threads)
    for _ in range(MOST_STEPS):
        if wave.index is None:
            return wave.way
        wave.step(wave.index)
    raise ValueError(f"a wave executes more than {MOST_STEPS} instructions")


class _Wave:
    """A wave on its way."""

    def __init__(self, code: Code, arguments: Mapping[int, int], threads: Sequence[int]) -> None:
        self.index: int | None = 0
        self.way = Way([0] * len(code.instructions))
        self._code, self._registers = code, Registers(code, arguments, threads)
        self._undecided: set[int] = set()  # branches of unknown outcome out of a loop

    def step(self, index: int) -> None:
        """Execute an instruction and go on to the next one."""
        instruction = self._code.instructions[index]
        self.way.counts[index] += 1
        following = self._code.successors[index]
        if len(following) == 2:
            taken = self._registers.condition(instruction.name)
            self.index = following[self._guess(index, *following) if taken is None else taken]
        else:
            self._registers.execute(instruction)
            self.index = following[0] if following else None

    def _guess(self, index: int, following: int, target: int) -> bool:
        """Whether a branch of unknown outcome is taken. A loop is left after one time through;
        what some lanes may execute is executed."""
        for loop in reversed(self._code.loops):
            if index in loop.body and (following in loop.body) != (target in loop.body):
                self.way.unknown.add(loop.head)
                leaves = loop.head in (following, target) or index in self._undecided
                self._undecided.add(index)
                return (target in loop.body) != leaves
        return self._code.instructions[index].name == "s_cbranch_execnz"
