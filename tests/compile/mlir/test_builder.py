"""The text that the MLIR builder writes."""

from __future__ import annotations

from compile.mlir.builder import Builder, Tensor


def test_generic_from_an_einsum() -> None:
    b = Builder()
    lhs, rhs = Tensor("%a", (4, "%k"), "bf16"), Tensor("%b", (8, "%k"), "bf16")
    out = b.contract("mk,nk->mn", lhs, rhs, (4, 8))
    text = b.text("m")
    assert out.type == "tensor<4x8xf32>"
    assert "affine_map<(d0, d1, d2) -> (d0, d2)>, affine_map<(d0, d1, d2) -> (d1, d2)>" in text
    assert 'iterator_types = ["parallel", "parallel", "reduction"]' in text
    assert text.count("arith.extf") == 2
    assert "tensor<4x?xbf16>, tensor<8x?xbf16>" in text


def test_reshapes_keep_track_of_sizes() -> None:
    b = Builder()
    x = Tensor("%x", (2, "%s", 6), "f32")
    merged = b.collapse(x, 0, 2)
    assert merged.shape[1:] == (6,) and isinstance(merged.shape[0], str)
    split = b.expand(merged, 1, 2, 3)
    assert split.shape == (merged.shape[0], 2, 3)
    assert "[[0], [1, 2]] output_shape" in b.lines[-1]
    assert b.slice(split, 1, 1, 1, drop=True).shape == (merged.shape[0], 3)


def test_sizes_multiply() -> None:
    b = Builder()
    assert b.product(2, 3) == 6
    assert b.product("%n") == "%n"
    assert not b.lines
    assert isinstance(b.product(2, "%n"), str) and "muli %n" in b.lines[-1]
