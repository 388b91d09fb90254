"""The evaluator of AMD's pseudo-code, against numpy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.hip.pcode import (
    Context,
    PcodeError,
    Value,
    evaluate,
    extend,
    fused,
    parse,
    real,
    unsigned,
)

RNG = np.random.default_rng(0)
A = RNG.integers(0, 2**32, 256, np.uint32)
B = RNG.integers(0, 2**32, 256, np.uint32)
X = (RNG.normal(size=256) * 2.0 ** RNG.integers(-20, 20, 256)).astype(np.float32)
Y = (RNG.normal(size=256) * 2.0 ** RNG.integers(-20, 20, 256)).astype(np.float32)


def run(text: str, **registers: Value) -> Context:
    return evaluate(text, {"S0": unsigned(A), "S1": unsigned(B), **registers})


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("D0.u32 = S0.u32 + S1.u32", A + B),
        ("D0.u32 = S0.u32 - 1U", A - np.uint32(1)),
        ("D0.i32 = S0.i32 >> S1[4 : 0].u32", (A.view(np.int32) >> (B & 31).astype(np.int32))),
        ("D0.u32 = ~S0.u32 & S1.u32 | 7U", ~A & B | np.uint32(7)),
        ("D0.u32 = 32'U((64'U(S0.u32) * 64'U(S1.u32)) >> 32U)",
         (A.astype(np.uint64) * B >> np.uint64(32)).astype(np.uint32)),
        ("D0.u32 = S0.i32 < S1.i32 ? S0.u32 : S1.u32",
         np.where(A.view(np.int32) < B.view(np.int32), A, B)),
        ("D0.u32 = 32'U(S0.u24) * 32'U(S1.u24)", (A & 0xFFFFFF) * (B & 0xFFFFFF)),
        ("D0.i32 = 32'I(signext(S0.i16))", A.astype(np.int16).astype(np.int32)),
        ("D0 = { S1[15 : 0].u16, S0[15 : 0].u16 }", A & 0xFFFF | B << np.uint32(16)),
        ("if S0.u32 > S1.u32 then\nD0.u32 = 1U\nelsif S0.u32[0] == 1'1U then\nD0.u32 = 2U\n"
         "else\nD0.u32 = 3U\nendif", np.where(A > B, 1, np.where(A & 1, 2, 3))),
        ("tmp = 0U;\nfor i in 0 : 3 do\ntmp += S0.u32[i * 8 + 7 : i * 8]\nendfor;\nD0.u32 = tmp",
         sum(A >> np.uint32(8 * k) & np.uint32(255) for k in range(4))),
        ("D0.u32[31 : 0] = S0.u32[0 : 31]",
         np.array([int(f"{a:032b}"[::-1], 2) for a in A.tolist()], np.uint32)),
        ("TWICE = lambda(a) (\na + a);\nD0.u32 = TWICE(S0.u32)", A + A),
    ],
)  # fmt: skip
def test_integers(text: str, want: np.ndarray) -> None:
    got = run(text)["D0"].bits.astype(np.uint32)
    assert np.array_equal(got, want.astype(np.int64).astype(np.uint32))


def test_floats() -> None:
    floats = {"S0": real(X), "S1": real(Y)}
    assert np.array_equal(evaluate("D0.f32 = S0.f32 * S1.f32", floats)["D0"].floats(), X * Y)
    half = evaluate("D0.f16 = f32_to_f16(S0.f32)", floats)["D0"]
    with np.errstate(over="ignore"):
        assert np.array_equal(half.floats(), X.astype(np.float16))
    number = evaluate("D0.i32 = f32_to_i32(S0.f32)", floats)["D0"]
    assert np.array_equal(number.integers(), np.trunc(X).astype(np.int64))


def test_conversions_saturate() -> None:
    floats = {"S0": real(np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, -0.7], np.float32))}
    signed = evaluate("D0.i32 = f32_to_i32(S0.f32)", floats)["D0"].integers()
    assert signed.tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0]
    positive = evaluate("D0.u32 = f32_to_u32(S0.f32)", floats)["D0"].integers()
    assert positive.tolist() == [0, 2**32 - 1, 0, 3_000_000_000, 0, 0]


def test_a_signalling_nan_survives_conversion() -> None:
    text = "D0.u32 = 32'U(isSignalNAN(64'F(S0.f32)))"
    assert evaluate(text, {"S0": unsigned(np.array([0x7F800001, 0x7FC00000]))})[
        "D0"
    ].bits.tolist() == [1, 0]


def test_denormals_are_flushed_on_both_sides() -> None:
    text = "D0.f32 = S0.f32 * S1.f32"
    values = {
        "S0": unsigned(np.array([1, 0x80000001, 0x00800000])),
        "S1": real(np.array([1, 1, 0.5], np.float32)),
    }
    assert evaluate(text, values)["D0"].bits.tolist() == [1, 0x80000001, 0x00400000]
    assert evaluate(text, values, flush_f32=True)["D0"].bits.tolist() == [0, 0x80000000, 0]


def test_fma_rounds_once() -> None:
    """Against exact fractions, near ties above all."""
    a = (1 + RNG.integers(0, 2**12, 4000) / 2**12).astype(np.float32)
    b = (1 + RNG.integers(0, 2**12, 4000) / 2**12).astype(np.float32)
    c = (RNG.integers(-1, 2, 4000) * 2.0 ** RNG.integers(-60, -22, 4000)).astype(np.float32)
    got = fused(a, b, c).astype(np.float32)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(result)) - exact)
        for other in (np.nextafter(result, np.float32(9)), np.nextafter(result, np.float32(-9))):
            distance = abs(Fraction(float(other)) - exact)
            assert error < distance or (error == distance and int(result.view(np.uint32)) % 2 == 0)


def test_65_bits() -> None:
    text = "{ D1.u1, D0.u64 } = 65'B(65'U(S0.u32) * 65'U(S1.u32) + 65'U(S2.u64))"
    wide = RNG.integers(0, 2**64, 256, np.uint64)
    context = run(text, S2=unsigned(wide, 64))
    exact = [int(a) * int(b) + int(c) for a, b, c in zip(A, B, wide, strict=True)]
    assert context["D0"].bits.tolist() == [value % 2**64 for value in exact]
    assert context["D1"].bits.tolist() == [value >> 64 for value in exact]


def test_what_was_written_is_noted() -> None:
    context = evaluate("D0[31 : 16].f16 = S0.f16", {"S0": unsigned(A), "D0": unsigned(B)})
    assert context.written["D0"].mask == 0xFFFF0000
    assert context.written["D0"].floats == {(16, 16)}
    assert np.array_equal(context["D0"].bits, B & 0xFFFF | A << np.uint32(16))


def test_extension() -> None:
    assert extend(Value(np.array([0x80], np.uint64), "i", 8), 16).bits.tolist() == [0xFF80]
    assert extend(Value(np.array([0x80], np.uint64), "u", 8), 16).bits.tolist() == [0x80]


@pytest.mark.parametrize("text", ["D0 = unknown(S0)", "while S0 do\nendwhile", "D0.u32 = S9.u32"])
def test_what_is_not_known_raises(text: str) -> None:
    with pytest.raises(PcodeError):
        run(text)


def test_statements_end_at_lines() -> None:
    assert len(parse("a = 1;\nb = 2\n// nothing\nc = 3")) == 3
