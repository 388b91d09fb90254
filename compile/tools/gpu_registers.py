"""What the registers of a wave hold while it runs, as far as that follows from what is known.

Integers are computed, lane by lane; floats, and what is loaded from memory, are unknown.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from compile.tools.gpu_code import Code, Instruction

ARGUMENTS = 1 << 40  # stands for the address of the kernel's arguments

Value = int | None  # None is unknown
Written = list[tuple[str, "Value | list[Value]"]]  # operand and its new value; a list is of lanes

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lg": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
# By the operation's name: of the operands, and last the width in bits.
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "mov": lambda a, w: a, "movk": lambda a, w: a, "accvgpr_read": lambda a, w: a,
    "accvgpr_write": lambda a, w: a, "not": lambda a, w: ~a,
    "add": lambda a, b, w: a + b, "addk": lambda a, b, w: a + b, "sub": lambda a, b, w: a - b,
    "subrev": lambda a, b, w: b - a, "mul": lambda a, b, w: a * b, "mulk": lambda a, b, w: a * b,
    "mul_lo": lambda a, b, w: a * b, "mul_hi": lambda a, b, w: a * b >> w,
    "min": lambda a, b, w: min(a, b), "max": lambda a, b, w: max(a, b),
    "and": lambda a, b, w: a & b, "or": lambda a, b, w: a | b, "xor": lambda a, b, w: a ^ b,
    "andn2": lambda a, b, w: a & ~b, "and_not1": lambda a, b, w: a & ~b,
    "orn2": lambda a, b, w: a | ~b, "or_not1": lambda a, b, w: a | ~b,
    "lshl": lambda a, b, w: a << b % w, "lshlrev": lambda a, b, w: b << a % w,
    "lshr": lambda a, b, w: a >> b % w, "lshrrev": lambda a, b, w: b >> a % w,
    "ashr": lambda a, b, w: a >> b % w, "ashrrev": lambda a, b, w: b >> a % w,
    "lshl1_add": lambda a, b, w: (a << 1) + b, "lshl2_add": lambda a, b, w: (a << 2) + b,
    "lshl3_add": lambda a, b, w: (a << 3) + b, "lshl4_add": lambda a, b, w: (a << 4) + b,
    "sbfe": lambda a, b, w: a >> b % 32 & (1 << (b >> 16 & 127)) - 1,
    "bfe": lambda a, b, c, w: a >> b % 32 & (1 << c % 32) - 1,
    "lshl_add": lambda a, b, c, w: (a << b % 32) + c, "or3": lambda a, b, c, w: a | b | c,
    "lshl_or": lambda a, b, c, w: a << b % 32 | c, "and_or": lambda a, b, c, w: a & b | c,
    "add_lshl": lambda a, b, c, w: (a + b) << c % 32, "add3": lambda a, b, c, w: a + b + c,
    "mad": lambda a, b, c, w: a * b + c, "med3": lambda a, b, c, w: sorted((a, b, c))[1],
}  # fmt: skip
_NAME = re.compile(r"([sv])_(\w+?)(?:_nc|_co)?_([uib])(32|64)(?:_[ui](?:24|32))?")
_COMPARISON = re.compile(r"([sv])_cmp([kx]?)_(eq|ne|lg|lt|le|gt|ge)_([ui])(32|64)")
_CARRYING = re.compile(r"([sv])_(add|sub)(?:c|b|c_co|b_co|_co_ci)_u32")
_SAVING = re.compile(r"s_(and|or|xor|andn2|and_not1)_saveexec_b(?:32|64)")
_SHORT = re.compile(r"s_(movk|addk|mulk|cmpk_\w+_i32)")
_WRITES_NOTHING = re.compile(
    r"(buffer|global|flat|scratch|ds)_(store|write)"
    r"|s_(wait|barrier|nop|clause|delay|denorm|round|set|sendmsg|sleep|c?branch|endpgm)"
)
_KEEPS_SCC = re.compile("s_(c?mov|cselect|mul|load|add_nc|sub_nc)")


def _targets(name: str, operands: Sequence[str]) -> Sequence[str]:
    """What an instruction writes; scc and exec, too."""
    if _WRITES_NOTHING.match(name):
        return []
    if name.startswith(("s_cmp", "s_bitcmp")):
        return ["scc"]
    if name.startswith("v_cmpx"):
        return ["exec", *operands[:-2]]
    has_two = "_co_" in name or name.startswith(("v_mad_u64", "v_mad_i64", "v_div_scale"))
    targets = list(operands[: 1 + (has_two and name.startswith("v_"))])
    if name.startswith("s_") and not _KEEPS_SCC.match(name):
        targets.append("scc")
    return [*targets, "exec"] if "saveexec" in name else targets


class Registers:
    """Registers of a wave of the first workgroup."""

    def __init__(self, code: Code, arguments: Mapping[int, int], threads: Sequence[int]) -> None:
        self._arguments, self._lanes = arguments, code.lanes
        self._vcc = "vcc" if code.lanes == 64 else "vcc_lo"
        self._vectors: dict[str, list[Value]] = {"v0": [None] * code.lanes}
        self._vectors["v0"][: len(threads)] = threads
        self._scalars: dict[str, int] = {"ttmp7": 0, "ttmp9": 0}
        self.write("exec", (1 << len(threads)) - 1)
        of = code.resources.get
        count, preloaded = of("user_sgpr_count", 0), of("user_sgpr_kernarg_preload_length", 0)
        first = 2 * of("user_sgpr_dispatch_ptr", 0) + 2 * of("user_sgpr_queue_ptr", 0)
        self.write(f"s[{first}:{first + 1}]", ARGUMENTS)
        for k in range(preloaded):
            self.write(f"s{count - preloaded + k}", arguments.get(4 * k))
        for k in range(3):  # numbers of the workgroup
            self.write(f"s{count + k}", 0)

    def condition(self, name: str) -> bool | None:
        """Whether a conditional branch is taken."""
        what = {"s": "scc", "v": self._vcc, "e": "exec"}[name[len("s_cbranch_")]]
        value = self.scalar(what)
        return None if value is None else bool(value) == name.endswith(("1", "nz"))

    def execute(self, instruction: Instruction) -> None:
        """Update the registers; what cannot be computed becomes unknown."""
        written = self._written(instruction)
        if instruction.pair:  # which reads what was there before
            written = [*written, *self._written(instruction.pair)]
        for operand, value in written:
            self.write(operand, value)

    # ---------------------------------------------------------------------------- reading, writing

    def scalar(self, operand: str) -> Value:
        """A constant, or what one or two scalar registers hold."""
        names = _names(operand)
        if isinstance(names, int):
            return names
        parts = [self._scalars.get(name) for name in names]
        return _joined(parts) if parts else None

    def lanes(self, operand: str) -> list[Value]:
        """What each lane sees of an operand."""
        names = _names(operand)
        if isinstance(names, int) or operand[0] not in "va" or operand.startswith("vcc"):
            return [self.scalar(operand)] * self._lanes
        unknown: list[Value] = [None] * self._lanes
        columns = [self._vectors.get(name, unknown) for name in names]
        return [_joined(parts) for parts in zip(*columns, strict=True)]

    def write(self, operand: str, value: Value | list[Value]) -> None:
        """Write an operand's registers; of a vector's, the lanes that are active."""
        names = _names(operand)
        if isinstance(names, int):
            return
        for k, name in enumerate(names):
            if isinstance(value, list):
                self._write_lanes(name, [None if v is None else _part(v, k) for v in value])
            elif value is not None:
                self._scalars[name] = _part(value, k)
            else:
                self._scalars.pop(name, None)
                self._vectors.pop(name, None)

    def _write_lanes(self, name: str, value: list[Value]) -> None:
        mask = self.scalar("exec")
        if mask != (1 << self._lanes) - 1:
            old = self._vectors.get(name) or [None] * self._lanes
            active = [None if mask is None else mask >> k & 1 for k in range(self._lanes)]
            value = [new if new == was or a else was if a == 0 else None
                     for a, new, was in zip(active, value, old, strict=True)]  # fmt: skip
        self._vectors[name] = value

    # ------------------------------------------------------------------------------------- results

    def _written(self, instruction: Instruction) -> Written:
        kind, details = _kind(instruction.name)
        operands = _extended(instruction.name, instruction.operands)
        if kind == "unknown":
            return _forgotten(instruction.name, operands)
        if kind == "load":
            return self._load(*operands[:3])
        if kind == "first":
            return [(operands[0], self._first(operands[1]))]
        if kind == "select":
            return self._select(details[0], operands)
        if kind == "save":
            return self._save_exec(details[0], *operands)
        if kind == "compare":
            return self._compare(details, operands)
        if kind == "carry":
            return self._carry(details[0], details[1], operands)
        return self._compute(instruction.name, details, operands)

    def _load(self, target: str, base: str, offset: str) -> Written:
        """Of the kernel's arguments; other memory is unknown."""
        start, distance, names = self.scalar(base), self.scalar(offset), _names(target)
        assert not isinstance(names, int)
        if start is None or distance is None:
            return [(target, None)]
        at = start + distance - ARGUMENTS
        return [(name, self._arguments.get(at + 4 * k)) for k, name in enumerate(names)]

    def _first(self, operand: str) -> Value:
        """Of the first active lane."""
        mask = self.scalar("exec")
        lane = (mask & -mask).bit_length() - 1 if mask else 0
        return None if mask is None else self.lanes(operand)[lane]

    def _select(self, unit: str, operands: Sequence[str]) -> Written:
        if unit == "s":
            scc = self.scalar("scc")
            chosen = None if scc is None else self.scalar(operands[1 if scc else 2])
            return [(operands[0], chosen)]
        mask = self.scalar(operands[3] if len(operands) > 3 else self._vcc)
        sides = zip(self.lanes(operands[1]), self.lanes(operands[2]), strict=True)
        return [(operands[0], [
            no if no == yes else None if mask is None else yes if mask >> lane & 1 else no
            for lane, (no, yes) in enumerate(sides)
        ])]  # fmt: skip

    def _save_exec(self, operation: str, target: str, source: str) -> Written:
        mask, value, bits = self.scalar("exec"), self.scalar(source), self._lanes
        result = None
        if mask is not None and value is not None:
            result = _ARITHMETIC[operation](value, mask, bits) & (1 << bits) - 1
        scc = None if result is None else int(result != 0)
        return [(target, mask), ("exec", result), ("scc", scc)]

    def _compare(self, details: tuple[str, ...], operands: Sequence[str]) -> Written:
        unit, form, relation, kind, bits = details
        compare, width = _COMPARE[relation], int(bits)
        columns = [self._inputs(unit, operand, kind, width) for operand in operands[-2:]]
        results = [
            None if None in pair else int(compare(*pair)) for pair in zip(*columns, strict=True)
        ]
        if unit == "s":
            return [("scc", results[0])]
        mask = self._mask(results)
        written: Written = [("exec", mask)] if form == "x" else []
        return [*written, *((operand, mask) for operand in operands[:-2])]

    def _mask(self, bits: Sequence[Value]) -> Value:
        """The mask of a bit of each lane; those that are not active have 0."""
        active = self.scalar("exec")
        if active is None:
            return None
        bits = [bit if active >> lane & 1 else 0 for lane, bit in enumerate(bits)]
        return None if None in bits else sum(1 << lane for lane, bit in enumerate(bits) if bit)

    def _carry(self, unit: str, operation: str, operands: Sequence[str]) -> Written:
        """An addition with the carry of the one before."""
        if unit == "v":  # as in addresses, of which nothing depends
            return [(operands[0], None), (operands[1], None)]
        a, b, carry = (self.scalar(operand) for operand in (operands[1], operands[2], "scc"))
        if a is None or b is None or carry is None:
            return [(operands[0], None), ("scc", None)]
        a, b = a & 0xFFFFFFFF, b & 0xFFFFFFFF
        result = a + b + carry if operation == "add" else a - b - carry
        return [(operands[0], result), ("scc", int(not 0 <= result < 1 << 32))]

    def _compute(self, name: str, details: tuple[str, ...], operands: tuple[str, ...]) -> Written:
        unit, operation, kind, bits = details
        function = _ARITHMETIC.get("sbfe" if name.startswith("s_bfe") else operation)
        has_carry = unit == "v" and "_co_" in name
        sources = operands[1 + has_carry :]
        if operation in ("addk", "mulk"):
            sources = operands  # the target is a source, too
        if function is None or function.__code__.co_argcount != len(sources) + 1:
            return _forgotten(name, tuple(operands))
        width = int(bits)
        columns = [self._inputs(unit, source, kind, width) for source in sources]
        results = [
            None if None in values else function(*values, width)
            for values in zip(*columns, strict=True)
        ]
        if unit == "v":
            over = [None if value is None else not 0 <= value < 1 << width for value in results]
            return [
                (operands[0], results),
                *((o, self._mask(over)) for o in operands[1 : 1 + has_carry]),
            ]
        written: Written = [(operands[0], results[0])]
        if not _KEEPS_SCC.match(name):
            written.append(("scc", _scc(name, operation, results[0], columns, width)))
        return written

    def _inputs(self, unit: str, operand: str, kind: str, width: int) -> list[Value]:
        """What a source holds: of each lane, or a scalar's; signed numbers if they are so."""
        values = self.lanes(operand) if unit == "v" else [self.scalar(operand)]
        return [None if value is None else _number(value, kind, width) for value in values]


@cache
def _kind(name: str) -> tuple[str, tuple[str, ...]]:
    """How an instruction is computed, and the parts of its name that matter for it."""
    name = name.replace("v_dual_", "v_")
    if name.startswith("s_load_"):
        return "load", ()
    if name.startswith("v_readfirstlane"):
        return "first", ()
    if re.fullmatch("s_cselect_b(32|64)|v_cndmask_b32", name):
        return "select", (name[0],)
    for kind, pattern in (("save", _SAVING), ("compare", _COMPARISON), ("carry", _CARRYING)):
        if match := pattern.fullmatch(name):
            return kind, match.groups()
    match = _NAME.fullmatch(name)
    return ("compute", match.groups()) if match and match[2] in _ARITHMETIC else ("unknown", ())


@cache
def _extended(name: str, operands: tuple[str, ...]) -> tuple[str, ...]:
    """Operands with a constant of 16 bits as the number that it is."""
    if not _SHORT.match(name):
        return operands
    number = int(operands[-1], 0) & 0xFFFF
    return *operands[:-1], str(number - (number >> 15 << 16))


@cache
def _forgotten(name: str, operands: tuple[str, ...]) -> Written:
    """All that an instruction writes, as unknown."""
    return [(target, None) for target in _targets(name, operands)]


def _scc(name: str, operation: str, result: Value, columns: list[list[Value]], width: int) -> Value:
    """The condition that a scalar instruction leaves: a carry, which was chosen, or not zero."""
    if result is None:
        return None
    if operation in ("min", "max"):
        return int(result == columns[0][0])
    if re.match("s_(add|sub|lshl._add)", name):  # of signed numbers, overflow
        low, high = (-(1 << width - 1), 1 << width - 1) if "_i" in name else (0, 1 << width)
        return int(not low <= result < high)
    return int(result & (1 << width) - 1 != 0)


def _number(value: int, kind: str, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if kind == "i" and value >> (width - 1) else value


def _part(value: int, index: int) -> int:
    return value >> 32 * index & 0xFFFFFFFF


def _joined(parts: Sequence[Value]) -> Value:
    """The number of which these are 32 bits each, the lowest first."""
    if None in parts:
        return None
    return sum(part << 32 * k for k, part in enumerate(parts) if part)


@cache
def _names(operand: str) -> tuple[str, ...] | int:
    """The registers of an operand, or the constant that it is; none if it is neither."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
        return int(operand, 0)
    if match := re.fullmatch(r"(s|v|a|ttmp)\[(\d+):(\d+)\]", operand):
        return tuple(f"{match[1]}{k}" for k in range(int(match[2]), int(match[3]) + 1))
    if operand in ("vcc", "exec"):
        return f"{operand}_lo", f"{operand}_hi"
    if re.fullmatch(r"(s|v|a|ttmp)\d+|(vcc|exec)_(lo|hi)|scc|m0", operand):
        return (operand,)
    return ()
