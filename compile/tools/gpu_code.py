"""The machine code of GPU kernels, as iree-compile writes it for an assembler, and its loops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BARRIERS = {"s_barrier", "s_barrier_wait"}

_LDS = re.compile(r"ds_(read|write|load|store|permute|bpermute|swizzle)")
_MEMORY = re.compile(r"(buffer|global|flat|scratch)_(load|store|atomic)")
_LOAD = re.compile(r"(buffer|global|flat|scratch)_load")
_EXCHANGE = re.compile("ds_(permute|bpermute|swizzle)")  # a register between lanes
_PAIR = re.compile("ds_(read2|write2|load_2addr|store_2addr)")
_WIDTH = re.compile(r"dwordx(\d)|(dword)|[us]?(byte)|[us]?(short)|_[bui](\d+)$")
_BYTES = {"dword": 4, "byte": 1, "short": 2}
_RESOURCE = re.compile(r"\.amdhsa_(\w+) (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One instruction; of a pair that is issued together (`::`), the first, with `pair`."""

    name: str  # without the encoding's suffix
    operands: tuple[str, ...]
    pair: Instruction | None = None

    @property
    def is_branch(self) -> bool:
        """Whether its operand is a label."""
        return self.name.startswith(("s_branch", "s_cbranch"))

    @property
    def is_load(self) -> bool:
        """Whether each lane reads memory that is not a workgroup's own."""
        return bool(_LOAD.match(self.name))

    @property
    def is_lds(self) -> bool:
        """Whether it uses LDS: for what a workgroup keeps there, or to exchange registers."""
        return bool(_LDS.match(self.name))

    @property
    def lane_bytes(self) -> int:
        """How many bytes each lane reads or writes, of memory or LDS; 0 of other instructions."""
        if _EXCHANGE.match(self.name):
            return 4
        if not (_MEMORY.match(self.name) or self.is_lds):
            return 0
        match = _WIDTH.search(re.sub("_d16(_hi)?$", "", self.name))
        assert match, self.name
        words, *kinds, bits = match.groups()
        size = 4 * int(words or 0) or int(bits or 0) // 8 or _BYTES["".join(filter(None, kinds))]
        return 2 * size if _PAIR.match(self.name) else size


@dataclass(frozen=True)
class Loop:
    """A loop, by the indices of its first instruction and of all of them."""

    head: int
    body: frozenset[int]


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and what a wave of it needs."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # -> index of the instruction that follows
    resources: dict[str, int] = field(default_factory=dict)  # .amdhsa_ and .set of the kernel

    @property
    def lanes(self) -> int:
        """Threads of a wave."""
        return 32 if self.resources.get("wavefront_size32") else 64

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Where a wave may go on after each instruction; a branch's target last."""
        return tuple(self._successors(index) for index in range(len(self.instructions)))

    def _successors(self, index: int) -> tuple[int, ...]:
        instruction = self.instructions[index]
        if instruction.name == "s_endpgm":
            return ()
        following = (index + 1,) if index + 1 < len(self.instructions) else ()
        if not instruction.is_branch:
            return following
        target = (self.labels[instruction.operands[0]],)
        return target if instruction.name == "s_branch" else following + target

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops, the outer before the inner; loops of one head are one."""
        bodies: dict[int, set[int]] = {}
        for source, head in self._back_edges():
            bodies.setdefault(head, set()).update(self._between(head, source))
        found = [Loop(head, frozenset(body)) for head, body in bodies.items()]
        return tuple(sorted(found, key=lambda loop: (-len(loop.body), loop.head)))

    @property
    def inner_loops(self) -> tuple[Loop, ...]:
        """Those that contain no other."""
        return tuple(
            loop for loop in self.loops
            if not any(other.body < loop.body for other in self.loops)
        )  # fmt: skip

    def _back_edges(self) -> Iterator[tuple[int, int]]:
        """Steps to an instruction that every way to the step's start leads through."""
        reachable = self._reach(0, None)
        for head in set(self.labels.values()) & reachable:
            dominated = reachable - self._reach(0, head)
            for source in self._predecessors[head]:
                if source in dominated:
                    yield source, head

    def _reach(self, start: int, without: int | None) -> set[int]:
        """Instructions that can follow `start`, on ways that avoid `without`."""
        found: set[int] = set()
        waiting = [start]
        while waiting:
            index = waiting.pop()
            if index in found or index == without:
                continue
            found.add(index)
            waiting += self.successors[index]
        return found

    def _between(self, head: int, source: int) -> set[int]:
        """Instructions on the ways from a loop's head to a branch back to it."""
        found = {head}
        waiting = [source]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += self._predecessors[index]
        return found

    @cached_property
    def _predecessors(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.instructions]
        for index in range(len(self.instructions)):
            for successor in self.successors[index]:
                found[successor].append(index)
        return found


def parse(text: str) -> dict[str, Code]:
    """All kernels in the assembly of a module, by name."""
    names = re.findall(r"^\s*\.type\s+(\S+),@function", text, re.MULTILINE)
    return {name: _kernel(name, text) for name in names}


def _kernel(name: str, text: str) -> Code:
    start = text.index(f"\n{name}:")
    end = text.find("\n.Lfunc_end", start)
    lines = text[start : end if end >= 0 else None]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in lines.partition("\t.section")[0].splitlines():
        line = raw.split(";")[0].split("//")[0].strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif line == ".p2align\t8":  # what stands before loads arguments where hardware did not
            instructions.clear()
        elif line and not line.startswith("."):
            instructions.append(instruction(line))
    resources = {key: int(value) for key, value in _RESOURCE.findall(lines)}
    used = re.findall(rf"^\s*\.set {re.escape(name)}\.(\w+), (\d+)$", text, re.MULTILINE)
    resources |= {key: int(value) for key, value in used}
    return Code(tuple(instructions), labels, resources)


def instruction(line: str) -> Instruction:
    """An instruction from its text."""
    first, *others = (_single(half) for half in line.split(" :: "))
    return Instruction(first.name, first.operands, others[0]) if others else first


def _single(text: str) -> Instruction:
    name, _, rest = text.strip().partition(" ")
    operands = _split(rest)
    if operands:  # modifiers stand behind the last operand
        operands[-1] = operands[-1].split()[0]
    return Instruction(re.sub(r"_e(32|64)$", "", name), tuple(operands))


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text) if part.strip()]
