"""Evaluates the pseudo-code of AMD's instruction set documents.

AMD's machine-readable ISA says what each instruction does in a small language; tinygrad carries the
texts (`tinygrad.runtime.autogen.amd.*.str_pcode.PCODE`). This module runs such a text for many
lanes at once: every value is an array with an element a lane, and branches run under a mask.

    evaluate("D0.u32 = S0.u32 + S1.u32", {"S0": unsigned(a), "S1": unsigned(b)})["D0"].bits

What a text cannot say (which lanes are active, modifiers, where operands lie) is up to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class PcodeError(Exception):
    """The text uses something that this evaluator does not know."""


# ------------------------------------------------------------------------------------------ values


@dataclass(frozen=True)
class Value:
    """A number a lane. `bits` holds it as a pattern: uint64 [lanes], Python's int above 64 bits."""

    bits: Array
    kind: str  # "u" unsigned or mere bits, "i" signed, "f" float, "bf" bfloat16
    width: int  # bits

    def floats(self) -> Array:
        """The numbers of a float value, in its own precision (bfloat16 as float32)."""
        if self.kind == "bf":
            return np.asarray((self.bits.astype(np.uint32) << np.uint32(16)).view(np.float32))
        pattern, number = _FLOATS[self.width]
        return np.asarray(np.asarray(self.bits.astype(pattern), order="C").view(number))

    def integers(self) -> Array:
        """The numbers of an integer value of at most 64 bits, as int64 or uint64."""
        wide = extend(self, 64).bits
        return np.asarray(wide.view(np.int64) if self.kind == "i" else wide)

    def truth(self) -> Array:
        """Whether each lane's number is not zero."""
        return self.bits != 0


_FLOATS: dict[int, tuple[Any, Any]] = {
    16: (np.uint16, np.float16),
    32: (np.uint32, np.float32),
    64: (np.uint64, np.float64),
}
_EXPONENTS = {16: (10, 5), 32: (23, 8), 64: (52, 11)}  # bits of mantissa and exponent


def ones(width: int) -> Any:
    """A mask of `width` bits, of the type that fits the arrays of that width."""
    mask = (1 << width) - 1
    return np.uint64(mask) if width <= 64 else mask


def _fit(bits: Array, width: int) -> Array:
    """`bits` in the array type that `width` wants."""
    if width > 64:
        return bits if bits.dtype == object else bits.astype(object)
    return bits if bits.dtype == np.uint64 else bits.astype(np.uint64)


def unsigned(bits: Array, width: int = 32) -> Value:
    """A value of mere bits."""
    array = np.asarray(bits)
    if width <= 64 and array.dtype == object:
        array = array & ((1 << width) - 1)
    return Value(_fit(array, width) & ones(width), "u", width)


def real(numbers: Array) -> Value:
    """A float value of the array's own precision."""
    numbers = np.ascontiguousarray(numbers).reshape(np.shape(numbers))
    width = numbers.dtype.itemsize * 8
    return Value(numbers.view(_FLOATS[width][0]).astype(np.uint64), "f", width)


def boolean(truth: Array) -> Value:
    """A value of one bit."""
    return Value(np.asarray(truth).astype(np.uint64), "u", 1)


def retype(value: Value, kind: str, width: int) -> Value:
    """The low `width` bits of `value` as another type; zeros above."""
    if width >= value.width:
        return Value(_fit(value.bits, width), kind, width)
    bits = value.bits & ones(width) if value.width <= 64 else value.bits & ((1 << width) - 1)
    return Value(_fit(bits, width), kind, width)


def extend(value: Value, width: int) -> Value:
    """An integer as one of `width` bits: with its sign if it has one; cut if that is fewer."""
    if width <= value.width or value.kind != "i":
        return retype(value, value.kind, width)
    if width > 64:
        signed = extend(value, 64).bits.view(np.int64).astype(object) & ((1 << width) - 1)
        return Value(signed, "i", width)
    shift = np.int64(64 - value.width)
    moved = (value.bits << np.uint64(64 - value.width)).view(np.int64) >> shift
    return Value(moved.view(np.uint64) & ones(width), "i", width)


def quiet_bit(width: int) -> np.uint64:
    """The bit of a float that tells a quiet NaN."""
    return np.uint64(1 << (_EXPONENTS[width][0] - 1))


def is_nan(value: Value) -> Array:
    """Which lanes hold a NaN."""
    return np.isnan(value.floats())


def is_signalling(value: Value) -> Array:
    """Which lanes hold a signalling NaN."""
    return np.asarray(is_nan(value) & ((value.bits & quiet_bit(value.width)) == 0))


def to_float(value: Value, width: int) -> Value:
    """A number as a float of `width` bits, to nearest even. NaNs keep their quiet bit."""
    if value.kind == "bf":
        value = real(value.floats())
    with np.errstate(all="ignore"):
        if value.kind != "f":
            return real(value.integers().astype(_FLOATS[width][1]))
        if value.width == width:
            return value
        result = real(value.floats().astype(_FLOATS[width][1]))
    signals = is_signalling(value)
    return Value(np.where(signals, _moved_nan(value, width), result.bits), "f", width)


def _moved_nan(value: Value, width: int) -> Array:
    """The NaN's sign and mantissa in a float of another width, still signalling."""
    (mantissa, exponent), (old_mantissa, _) = _EXPONENTS[width], _EXPONENTS[value.width]
    sign = value.bits >> np.uint64(value.width - 1) << np.uint64(width - 1)
    fraction = value.bits & ones(old_mantissa)
    if mantissa >= old_mantissa:
        fraction = fraction << np.uint64(mantissa - old_mantissa)
    else:
        fraction = np.maximum(fraction >> np.uint64(old_mantissa - mantissa), np.uint64(1))
    return np.asarray(sign | ones(exponent) << np.uint64(mantissa) | fraction)


def flush(value: Value) -> Value:
    """Denormal floats become zeros of their sign."""
    mantissa, exponent = _EXPONENTS[value.width]
    is_small = (value.bits >> np.uint64(mantissa) & ones(exponent)) == 0
    sign = value.bits & np.uint64(1 << (value.width - 1))
    return Value(np.where(is_small, sign, value.bits), "f", value.width)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, of float32 or float16 numbers, as a float64 that rounds like the exact result.

    The product is exact in float64. The sum is rounded to odd: where bits are lost, the last bit is
    set; then another rounding, to fewer bits, finds on which side of a tie the exact sum lies.
    """
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = c.astype(np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
    bits = total.view(np.uint64)
    is_inexact = np.isfinite(total) & (error != 0) & ((bits & np.uint64(1)) == 0)
    is_outwards = (error > 0) == (total > 0)
    step = np.where(is_outwards, np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF))
    return np.where(is_inexact, bits + step, bits).view(np.float64)


# ------------------------------------------------------------------------------------------ parser

_TOKEN = re.compile(
    r"""\s+|//[^\n]*
    |(?P<cast>\d+'[UIFB](?=\())
    |(?P<type>\d+'[UIFB])
    |(?P<sized>\d+'-?(?:0x[0-9a-fA-F]+|\d+\.\d+|\d+)U?)
    |(?P<number>0x[0-9a-fA-F]+(?:ULL|LL|U)?|\d+\.\d+F?|\d+(?:ULL|LL|U)?)
    |(?P<member>\.(?:bf|[uifb])\d+)
    |(?P<name>[A-Za-z_]\w*(?:\.[A-Z]\w*)?)
    |(?P<op>\*\*|<<|>>|<=|>=|==|!=|<>|&&|\|\||\+=|-=|[-+*/%&|^~!<>=?:;,()\[\]{}])""",
    re.VERBOSE,
)
_BINARY = [
    ["||"], ["&&"], ["|"], ["^"], ["&"], ["==", "!=", "<>"], ["<=", ">=", "<", ">"],
    ["<<", ">>"], ["+", "-"], ["*", "/", "%"], ["**"],
]  # fmt: skip
Node = tuple[Any, ...]


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token, without comments."""
    found, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise PcodeError(f"cannot read {text[position : position + 20]!r}")
        if match.lastgroup:
            found.append((match.lastgroup, match.group()))
        position = match.end()
    return found


class _Parser:
    """Recursive descent over the tokens of one text. Nodes are tuples, their kind first."""

    def __init__(self, text: str) -> None:
        self.tokens = [*_tokens(text), ("end", "")]
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][1]

    def take(self, expected: str | None = None) -> str:
        text = self.tokens[self.at][1]
        if expected is not None and text != expected:
            raise PcodeError(f"{expected!r} expected, not {text!r}")
        self.at += 1
        return text

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def block(self, *ends: str) -> list[Node]:
        """Statements up to one of `ends`, which stays."""
        statements: list[Node] = []
        while self.tokens[self.at][0] != "end" and self.peek() not in ends:
            if not self.accept(";"):
                statements.append(self.statement())
        return statements

    def statement(self) -> Node:
        word = self.peek()
        if word == "if":
            return self.conditional()
        if word == "for":
            return self.loop()
        if word == "declare":
            return self.declaration()
        target = self.expression()
        if self.accept("="):
            if self.peek() == "lambda":
                return self.function(target)
            return ("assign", target, self.expression())
        operator = self.take()
        if operator not in ("+=", "-="):
            raise PcodeError(f"no statement: {target}")
        return ("assign", target, ("binary", operator[0], target, self.expression()))

    def conditional(self) -> Node:
        self.take()  # if or elsif
        condition = self.expression()
        self.take("then")
        then = self.block("elsif", "else", "endif")
        if self.peek() == "elsif":
            return ("if", condition, then, [self.conditional()])
        otherwise = self.block("endif") if self.accept("else") else []
        self.take("endif")
        return ("if", condition, then, otherwise)

    def loop(self) -> Node:
        self.take("for")
        name = self.take()
        self.take("in")
        first = self.binary(0)
        self.take(":")
        last = self.expression()
        self.take("do")
        body = self.block("endfor")
        self.take("endfor")
        return ("for", name, first, last, body)

    def declaration(self) -> Node:
        self.take("declare")
        name = self.take()
        self.take(":")
        width, kind = self.take().split("'")
        count = 0
        if self.accept("["):
            count = int(self.take())
            self.take("]")
        return ("declare", name, kind.lower(), int(width), count)

    def function(self, target: Node) -> Node:
        """A lambda whose body is one expression."""
        self.take("lambda")
        self.take("(")
        parameters = [self.take()]
        while self.accept(","):
            parameters.append(self.take())
        self.take(")")
        self.take("(")
        body = self.expression()
        self.take(")")
        return ("lambda", target[1], parameters, body)

    def expression(self) -> Node:
        condition = self.binary(0)
        if not self.accept("?"):
            return condition
        then = self.expression()
        self.take(":")
        return ("ternary", condition, then, self.expression())

    def binary(self, level: int) -> Node:
        if level == len(_BINARY):
            return self.unary()
        left = self.binary(level + 1)
        while self.tokens[self.at][0] == "op" and self.peek() in _BINARY[level]:
            operator = self.take()
            left = ("binary", operator, left, self.binary(level + 1))
        return left

    def unary(self) -> Node:
        if self.peek() in ("!", "~", "-", "+") and self.tokens[self.at][0] == "op":
            return ("unary", self.take(), self.unary())
        return self.postfix(self.primary())

    def postfix(self, node: Node) -> Node:
        while True:
            if self.tokens[self.at][0] == "member":
                kind, width = re.fullmatch(r"\.([a-z]+)(\d+)", self.take()).groups()  # type: ignore[union-attr]
                node = ("member", node, "u" if kind == "b" else kind, int(width))
            elif self.accept("["):
                high = self.binary(0)
                if self.accept(":"):
                    node = ("slice", node, high, self.binary(0))
                else:
                    node = ("index", node, high)
                self.take("]")
            else:
                return node

    def primary(self) -> Node:
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind == "cast":
            width, name = text.split("'")
            return ("cast", name.lower(), int(width), self.parentheses())
        if kind in ("sized", "number"):
            return ("literal", _literal(text))
        if text == "(":
            self.at -= 1
            return self.parentheses()
        if text == "{":
            return ("concatenate", self.arguments("}"))
        if kind == "name":
            return ("call", text, self.arguments(")")) if self.accept("(") else ("name", text)
        raise PcodeError(f"unexpected {text!r}")

    def parentheses(self) -> Node:
        self.take("(")
        inner = self.expression()
        self.take(")")
        return inner

    def arguments(self, end: str) -> list[Node]:
        found = [self.expression()]
        while self.accept(","):
            found.append(self.expression())
        self.take(end)
        return found


def _literal(text: str) -> Value:
    """A constant: 7, 7U, 7LL, 0x10ULL, 1.0, 1.0F, 16'4, 1'1U."""
    if "'" in text:
        size, _, text = text.partition("'")
        width = int(size)
    else:
        width = 64 if text.endswith("LL") or (text.count(".") and text[-1] != "F") else 32
    if "." in text:
        return real(np.asarray(text.rstrip("F"), _FLOATS[width][1]))
    number, kind = text.rstrip("UL"), "u" if "U" in text else "i"
    return Value(np.asarray(int(number, 0) & ((1 << width) - 1), np.uint64), kind, width)


@cache
def parse(text: str) -> tuple[Node, ...]:
    """The statements of a text. Raises PcodeError where it uses what is not known here."""
    return tuple(_Parser(text).block())


# --------------------------------------------------------------------------------------- functions


def _signed_extension(value: Value) -> Value:
    return extend(Value(value.bits, "i", value.width), 64)


def _extension_from_bit(value: Value, count: Value) -> Value:
    """The low `count` bits of a number, extended by their sign. Of no bits: 0."""
    shift = (np.uint64(64) - count.bits) & np.uint64(63)
    moved = (value.bits << shift).view(np.int64) >> shift.astype(np.int64)
    bits = np.where(count.bits == 0, np.uint64(0), moved.view(np.uint64)) & ones(value.width)
    return Value(bits, "i", value.width)


def _to_integer(value: Value, kind: str, width: int) -> Value:
    """A float as an integer, towards zero; what does not fit saturates, NaN gives 0."""
    low, high = (0, 2**width - 1) if kind == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    numbers = np.nan_to_num(value.floats().astype(np.float64), nan=0.0)
    whole = np.trunc(np.clip(numbers, float(low), float(high))).astype(np.int64)
    return Value(whole.view(np.uint64) & ones(width), kind, width)


def _by_real(function: Callable[[Array], Array]) -> Callable[[Value], Value]:
    """A function of numbers as one of values, in the precision of its argument."""

    def apply(value: Value) -> Value:
        with np.errstate(all="ignore"):
            return real(function(value.floats()))

    return apply


def _absolute(value: Value) -> Value:
    return Value(value.bits & ones(value.width - 1), value.kind, value.width)


def _fma(a: Value, b: Value, c: Value) -> Value:
    if a.width == 64:
        raise PcodeError("fma of f64")
    result = fused(a.floats(), b.floats(), c.floats())
    with np.errstate(all="ignore"):
        return real(result.astype(_FLOATS[a.width][1]))


def _power(base: Value, exponent: Value) -> Value:
    with np.errstate(all="ignore"):
        numbers = np.power(base.floats().astype(np.float64), exponent.floats().astype(np.float64))
        return real(numbers.astype(np.float32))


def _exponent(value: Value) -> Value:
    mantissa, bits = _EXPONENTS[value.width]
    return Value(value.bits >> np.uint64(mantissa) & ones(bits), "i", 32)


Function = Callable[..., Value]
FUNCTIONS: dict[str, Function] = {
    "f32_to_f16": lambda v: to_float(v, 16),
    "f16_to_f32": lambda v: to_float(v, 32),
    "bf16_to_f32": lambda v: to_float(v, 32),
    "i32_to_f32": lambda v: to_float(v, 32),
    "u32_to_f32": lambda v: to_float(v, 32),
    "f32_to_i32": lambda v: _to_integer(v, "i", 32),
    "f32_to_u32": lambda v: _to_integer(v, "u", 32),
    "signext": _signed_extension,
    "signext_from_bit": _extension_from_bit,
    "floor": _by_real(np.floor),
    "trunc": _by_real(np.trunc),
    "sqrt": _by_real(np.sqrt),
    "abs": _absolute,
    "fma": _fma,
    "pow": _power,
    "sign": lambda v: Value(v.bits >> np.uint64(v.width - 1), "u", 1),
    "exponent": _exponent,
    "isNAN": lambda v: boolean(is_nan(v)),
    "isSignalNAN": lambda v: boolean(is_signalling(v)),
    "isQuietNAN": lambda v: boolean(is_nan(v) & ~is_signalling(v)),
    "cvtToQuietNAN": lambda v: Value(v.bits | quiet_bit(v.width), "f", v.width),
}


# ------------------------------------------------------------------------------------- evaluation


def _common(a: Value, b: Value) -> tuple[Value, Value]:
    """Both integers in one type, as C would: the wider; unsigned if one of that width is."""
    width = max(a.width, b.width)
    kinds = {v.kind for v in (a, b) if v.width == width}
    kind = "u" if "u" in kinds else "i"
    return tuple(Value(extend(v, width).bits, kind, width) for v in (a, b))  # type: ignore[return-value]


_BASIC: dict[str, Any] = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}


def _arithmetic(operator: str, a: Value, b: Value) -> Value:
    """+ - * / of integers or floats."""
    if "f" in (a.kind, b.kind) or "bf" in (a.kind, b.kind):
        width = max(v.width for v in (a, b) if v.kind == "f")
        x, y = to_float(a, width).floats(), to_float(b, width).floats()
        with np.errstate(all="ignore"):
            return real(_BASIC[operator](x, y))
    if operator == "/":
        raise PcodeError("a quotient of integers")
    a, b = _common(a, b)
    with np.errstate(over="ignore"):
        result = _BASIC[operator](a.bits, b.bits)
    return Value(_fit(result & ones(a.width), a.width), a.kind, a.width)


def _bitwise(operator: str, a: Value, b: Value) -> Value:
    a, b = _common(a, b)
    function = {"&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor}[operator]
    return Value(function(a.bits, b.bits), a.kind, a.width)


def _compare(operator: str, a: Value, b: Value) -> Value:
    function = {
        "==": np.equal, "!=": np.not_equal, "<>": np.not_equal,
        "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal,
    }[operator]  # fmt: skip
    if "f" in (a.kind, b.kind):
        width = max(a.width, b.width)
        return boolean(function(to_float(a, width).floats(), to_float(b, width).floats()))
    a, b = _common(a, b)
    if a.width > 64:
        return boolean(function(a.bits, b.bits))
    return boolean(function(a.integers(), b.integers()))


def _shift(operator: str, a: Value, b: Value) -> Value:
    """Shifts by any amount: what leaves the width is lost, a sign moves in from above."""
    if a.width > 64:
        amount = b.bits.astype(object)
        moved = a.bits << amount if operator == "<<" else a.bits >> amount
        return Value(moved & ((1 << a.width) - 1), a.kind, a.width)
    amount = np.minimum(b.bits, np.uint64(63))
    is_far = b.bits >= np.uint64(a.width)
    if operator == "<<":
        moved = np.where(is_far, np.uint64(0), a.bits << amount)
        return Value(moved & ones(a.width), a.kind, a.width)
    if a.kind == "i":
        moved = extend(a, 64).bits.view(np.int64) >> amount.astype(np.int64)
        return Value(moved.view(np.uint64) & ones(a.width), "i", a.width)
    return Value(np.where(is_far, np.uint64(0), a.bits >> amount), a.kind, a.width)


def _logical(operator: str, a: Value, b: Value) -> Value:
    return boolean(a.truth() & b.truth() if operator == "&&" else a.truth() | b.truth())


_OPERATORS: dict[str, Callable[[str, Value, Value], Value]] = {
    **dict.fromkeys(("+", "-", "*", "/"), _arithmetic),
    **dict.fromkeys(("&", "|", "^"), _bitwise),
    **dict.fromkeys(("==", "!=", "<>", "<", "<=", ">", ">="), _compare),
    **dict.fromkeys(("<<", ">>"), _shift),
    **dict.fromkeys(("&&", "||"), _logical),
}


def _negated(value: Value) -> Value:
    if value.kind == "f":
        return Value(value.bits ^ np.uint64(1 << (value.width - 1)), "f", value.width)
    return Value((~value.bits + np.uint64(1)) & ones(value.width), "i", value.width)


def _unary(operator: str, value: Value) -> Value:
    if operator == "!":
        return boolean(~value.truth())
    if operator == "~":
        return Value(value.bits ^ ones(value.width), value.kind, value.width)
    return _negated(value) if operator == "-" else value


def _cast(value: Value, kind: str, width: int) -> Value:
    """width'kind(value): the same number in another type."""
    if kind == "f":
        return to_float(value, width)
    kind = "u" if kind == "b" else kind
    if value.kind == "f":
        return _to_integer(value, kind, width)
    return Value(extend(value, width).bits, kind, width)


@dataclass
class Written:
    """What a text has written to a register."""

    mask: int = 0  # of bits, whatever the lane
    # Of float results: (lowest bit, width).
    floats: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Context:
    """The variables and registers of one evaluation."""

    variables: dict[str, Any]  # Value, or a list of them
    flush_f32: bool  # denormals of float32 sources and results become zeros
    functions: Mapping[str, Function]
    written: dict[str, Written] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        value = self.variables[name]
        assert isinstance(value, Value)
        return value

    # ---- expressions

    def value(self, node: Node) -> Value:
        result: Value = getattr(self, "_" + node[0])(*node[1:])
        return result

    def _literal(self, value: Value) -> Value:
        return value

    def _name(self, name: str) -> Value:
        if name in self.variables:
            return self[name]
        raise PcodeError(f"{name} is not defined")

    def _member(self, node: Node, kind: str, width: int) -> Value:
        value = retype(self.value(node), kind, width)
        is_source = node[0] in ("name", "slice", "index") and _root(node)[0] in "SD"
        return flush(value) if is_source and self._flushes(kind, width) else value

    def _flushes(self, kind: str, width: int) -> bool:
        return self.flush_f32 and (kind, width) == ("f", 32)

    def _slice(self, node: Node, high: Node, low: Node) -> Value:
        first, last = self.constant(low), self.constant(high)
        value = self.value(node)
        if last < first:  # in the opposite order
            one = np.uint64(1)
            places = [np.uint64(place) for place in range(last, first + 1)]
            bits = sum(
                ((value.bits >> place & one) << np.uint64(first) - place for place in places),
                np.uint64(0),
            )
            return Value(bits, "u", first - last + 1)
        bits = value.bits >> (np.uint64(first) if value.width <= 64 else first)
        return retype(Value(bits, "u", value.width), "u", last - first + 1)

    def _index(self, node: Node, index: Node) -> Value:
        if index == ("name", "laneId"):  # a bit of a mask: the caller gives masks as a bit a lane
            return self.value(("name", _root(node)))
        position = self.constant(index)
        if node[0] == "name" and isinstance(self.variables.get(node[1]), list):
            element: Value = self.variables[node[1]][position]
            return element
        return self._slice(node, ("literal", _number(position)), ("literal", _number(position)))

    def constant(self, node: Node) -> int:
        """The value of what must be equal in all lanes."""
        bits = np.asarray(self.value(node).integers())
        first = int(bits.reshape(-1)[0])
        if not (bits == first).all():
            raise PcodeError("differs between lanes")
        return first

    def _cast(self, kind: str, width: int, node: Node) -> Value:
        return _cast(self.value(node), kind, width)

    def _unary(self, operator: str, node: Node) -> Value:
        return _unary(operator, self.value(node))

    def _binary(self, operator: str, left: Node, right: Node) -> Value:
        if operator not in _OPERATORS:
            raise PcodeError(f"operator {operator}")
        if operator == "==" and _is_signed_zero(right):
            a, b = self.value(left), self.value(right)
            return boolean(to_float(a, b.width).bits == b.bits)
        return _OPERATORS[operator](operator, self.value(left), self.value(right))

    def _ternary(self, condition: Node, then: Node, otherwise: Node) -> Value:
        a, b = self.value(then), self.value(otherwise)
        if a.width != b.width:
            a, b = _common(a, b)
        return Value(np.where(self.value(condition).truth(), a.bits, b.bits), a.kind, a.width)

    def _concatenate(self, nodes: list[Node]) -> Value:
        values = [self.value(node) for node in nodes]
        width = sum(value.width for value in values)
        bits = _fit(np.asarray(0, np.uint64), width)
        for value in values:
            bits = bits << np.uint64(value.width) if width <= 64 else bits << value.width
            bits = bits | _fit(value.bits, width)
        return Value(bits, "u", width)

    def _call(self, name: str, nodes: list[Node]) -> Value:
        function = self.functions.get(name) or FUNCTIONS.get(name)
        local = self.variables.get(name)
        values = [self.value(node) for node in nodes]
        if isinstance(local, tuple):
            parameters, body = local
            inner = Context(dict(zip(parameters, values, strict=True)), False, self.functions)
            return inner.value(body)
        if function is None:
            raise PcodeError(f"function {name}")
        return function(*values)

    # ---- statements

    def run(self, statements: list[Node] | tuple[Node, ...], active: Array | None) -> None:
        """Runs statements in the lanes that `active` names; None is all of them."""
        for statement in statements:
            getattr(self, "_run_" + statement[0])(active, *statement[1:])

    def _run_if(self, active: Array | None, condition: Node, then: Any, otherwise: Any) -> None:
        truth = np.asarray(self.value(condition).truth())
        for branch, taken in ((then, truth), (otherwise, ~truth)):
            lanes = taken if active is None else taken & active
            if lanes.any():
                self.run(branch, lanes)

    def _run_for(self, active: Array | None, name: str, first: Node, last: Node, body: Any) -> None:
        for i in range(self.constant(first), self.constant(last) + 1):
            self.variables[name] = _number(i)
            self.run(body, active)

    def _run_declare(self, active: Array | None, name: str, kind: str, width: int, n: int) -> None:
        if n:
            self.variables.setdefault(name, [_zero(width) for _ in range(n)])
        else:
            self.variables[name] = _zero(width)

    def _run_lambda(self, active: Array | None, name: str, parameters: Any, body: Node) -> None:
        self.variables[name] = (parameters, body)

    def _run_assign(self, active: Array | None, target: Node, node: Node) -> None:
        self.assign(active, target, self.value(node))
        source = node[1] if node[0] == "member" else node
        if source[0] == "name" and source[1] in self.written:  # D0.b64 = tmp
            self.written[_root(target)].floats |= self.written[source[1]].floats

    def assign(self, active: Array | None, target: Node, value: Value) -> None:
        """target = value, in the active lanes."""
        if target[0] == "concatenate":
            self._assign_parts(active, target[1], value)
            return
        if target[0] == "member":
            _, target, kind, width = target
            value = _as_result(value, kind, width)
            if self._flushes(kind, width):
                value = flush(value)
        name = _root(target)
        if target[0] == "index" and target[2] == ("name", "laneId"):
            target, value = ("name", name), retype(value, "u", 1)
        if target[0] == "index" and isinstance(self.variables.get(name), list):
            self.variables[name][self.constant(target[2])] = value
            return
        low = self._lowest_bit(target)
        note = self.written.setdefault(name, Written())
        note.mask |= ((1 << value.width) - 1) << low
        if value.kind == "f":
            note.floats.add((low, value.width))
        self._store(active, name, value, low, is_part=target[0] != "name")

    def _assign_parts(self, active: Array | None, targets: list[Node], value: Value) -> None:
        """{ high, low } = value."""
        low = 0
        for target in reversed(targets):
            width = target[3]
            bits = value.bits >> (low if value.width > 64 else np.uint64(low))
            self.assign(active, target, retype(Value(bits, "u", value.width), "u", width))
            low += width

    def _lowest_bit(self, target: Node) -> int:
        """At which bit of its register `target` begins."""
        if target[0] == "slice":
            return self.constant(target[3])
        return self.constant(target[2]) if target[0] == "index" else 0

    def _store(
        self, active: Array | None, name: str, value: Value, low: int, *, is_part: bool
    ) -> None:
        old = self.variables.get(name)
        if is_part:
            width = max(old.width if isinstance(old, Value) else 0, low + value.width, 64)
            before = retype(old, "u", width) if isinstance(old, Value) else _zero(width)
            hole = ~np.uint64(((1 << value.width) - 1) << low)
            bits = (before.bits & hole) | (value.bits << np.uint64(low))
            value = Value(bits, "u", width)
        if active is not None:
            before = old if isinstance(old, Value) else _zero(value.width)
            if before.width != value.width:
                width = max(before.width, value.width)
                before = retype(before, value.kind, width)
                value = retype(value, value.kind, width)
            value = Value(np.where(active, value.bits, before.bits), value.kind, value.width)
        self.variables[name] = value


def _is_signed_zero(node: Node) -> bool:
    """Whether a text says +0.0 or -0.0, and not 0.0: there the sign counts."""
    if node[0] != "unary" or node[1] not in "+-" or node[2][0] != "literal":
        return False
    value: Value = node[2][1]
    return value.kind == "f" and not value.truth().any()


def _as_result(value: Value, kind: str, width: int) -> Value:
    """What an assignment to a typed register stores."""
    if kind == "f" and value.kind == "f":
        return to_float(value, width)
    if kind != "f" and value.kind == "i":
        return Value(extend(value, width).bits, kind, width)
    return retype(value, kind, width)


def _root(node: Node) -> str:
    """The name of the register that an expression is part of."""
    while node[0] != "name":
        node = node[1]
        if not isinstance(node, tuple):
            raise PcodeError("no register")
    name: str = node[1]
    return name


def _number(number: int) -> Value:
    return Value(np.asarray(number, np.uint64), "i", 32)


def _zero(width: int) -> Value:
    return Value(_fit(np.asarray(0, np.uint64), width), "u", width)


def evaluate(
    text: str,
    registers: Mapping[str, Value | list[Value]],
    *,
    flush_f32: bool = False,
    functions: Mapping[str, Function] | None = None,
) -> Context:
    """Runs a text. Returns its registers afterwards, and what it has written.

    registers: what the text may read, an array a register with an element a lane. Where it takes
    one bit of a mask by `laneId`, the register holds that bit.
    functions: instructions that the text calls by their names.
    """
    context = Context(dict(registers), flush_f32, {} if functions is None else functions)
    context.run(parse(text), None)
    return context
