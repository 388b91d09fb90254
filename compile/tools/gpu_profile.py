"""What a kernel's machine code does in a workgroup, and the least time that a card takes for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from compile.tools.gpu_cards import MATRIX, Architecture, Card, Cycles
from compile.tools.gpu_code import BARRIERS, Code, Instruction, Loop
from compile.tools.gpu_walk import Way, walk


@dataclass
class Work:
    """What waves execute. The instructions that make it up are counted once a wave."""

    vector: float = 0
    matrix: float = 0
    loads: Counter[int] = field(default_factory=Counter)  # of memory: bytes a lane -> how many
    lds_bytes: float = 0
    barriers: float = 0
    vector_cycles: float = 0
    matrix_cycles: float = 0
    transcendental_cycles: float = 0

    @property
    def load_bytes(self) -> float:
        """Bytes that one lane of each wave loads from memory."""
        return sum(size * number for size, number in self.loads.items())

    @property
    def cycles(self) -> float:
        """That a SIMD needs to issue it all; what can overlap does."""
        return max(self.vector_cycles, self.matrix_cycles, self.transcendental_cycles)

    def add(self, instruction: Instruction, cycles: Cycles, times: float, lanes: int) -> None:
        """An instruction, executed so many times by waves of `lanes` threads."""
        name = instruction.name
        self.vector_cycles += times * cycles.vector
        self.matrix_cycles += times * cycles.matrix
        self.transcendental_cycles += times * cycles.transcendental
        if name.startswith(MATRIX):
            self.matrix += times
        elif name.startswith("v_"):
            self.vector += times
        elif instruction.is_lds:
            self.lds_bytes += times * instruction.lane_bytes * lanes
        elif instruction.is_load:
            self.loads[instruction.lane_bytes] += times  # type: ignore[assignment]
        elif name in BARRIERS:
            self.barriers += times


@dataclass(frozen=True)
class LoopProfile:
    """An inner loop: how often the first wave goes through it (None if that cannot be told), and
    what it does each time."""

    times: int | None
    work: Work


@dataclass(frozen=True)
class Profile:
    """A kernel in one dispatch."""

    waves: int  # of a workgroup
    work: Work  # of a workgroup
    longest: float  # cycles of the wave that has most
    loops: tuple[LoopProfile, ...]
    has_unknown: bool  # whether it cannot be told how often some loop is gone through


@dataclass(frozen=True)
class Bound:
    """The least seconds that a dispatch takes, by what limits it."""

    memory: float
    lds: float
    issue: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.memory, self.lds, self.issue)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(("memory", "lds", "issue"), key=lambda name: float(getattr(self, name)))


def profile(
    code: Code, arguments: Mapping[int, int], size: tuple[int, int, int], chip: Architecture
) -> Profile:
    """What a workgroup of `size` threads (x, y, z) does; arguments: as of `walk`."""
    threads = [
        x | y << 10 | z << 20
        for z in range(size[2])
        for y in range(size[1])
        for x in range(size[0])
    ]
    ways = [
        walk(code, arguments, threads[k : k + code.lanes])
        for k in range(0, len(threads), code.lanes)
    ]
    names = {instruction.name for instruction in code.instructions}
    cycles = {name: chip.cycles_of(name, code.lanes) for name in names}
    works = [_work(code, way.counts, cycles) for way in ways]
    total = _work(code, list(map(sum, zip(*(way.counts for way in ways), strict=True))), cycles)
    total.barriers = works[0].barriers
    return Profile(
        len(ways), total, max(work.cycles for work in works), tuple(_loops(code, ways[0], cycles)),
        any(way.unknown for way in ways),
    )  # fmt: skip


def bound(
    profile: Profile, workgroups: int, num_bytes: int, card: Card, share: float = 1.0
) -> Bound:
    """The least time of a dispatch that moves `num_bytes`, if nothing waits for anything.

    share: of what the profile's workgroup does, what all do on average.
    """
    rounds = -(-workgroups // card.units) * share  # workgroups of the unit that has most
    issue = max(rounds * profile.work.cycles / card.simds, profile.longest)
    lds = rounds * profile.work.lds_bytes / card.architecture.lds_bandwidth
    return Bound(num_bytes / card.bandwidth, lds / card.clock, issue / card.clock)


def _work(
    code: Code, counts: Sequence[int], cycles: Mapping[str, Cycles], loop: Loop | None = None
) -> Work:
    """What is executed as often as `counts` says; of a loop, what it does each time."""
    work = Work()
    passes = counts[loop.head] if loop else 1
    for index in loop.body if loop else range(len(counts)):
        if counts[index]:
            instruction = code.instructions[index]
            work.add(instruction, cycles[instruction.name], counts[index] / passes, code.lanes)
    return work


def _loops(code: Code, way: Way, cycles: Mapping[str, Cycles]) -> Iterator[LoopProfile]:
    """The inner loops that the wave comes to."""
    for loop in code.inner_loops:
        if way.counts[loop.head]:
            yield LoopProfile(way.times(loop), _work(code, way.counts, cycles, loop))
