"""Vision towers that make a Llama's embeddings of pixels, emitted as tensor operations, for GPUs.

SigLIP with pixel shuffle and a linear connector (Idefics3, Laurencon et al. 2024), or CLIP with a
two-layer projector (LLaVA-1.5, Liu et al. 2023). Shapes: N tiles, P patches of a tile, T positions
(patches, and CLIP's class token), C of them with padding to whole blocks of a GPU's kernels,
H hidden features, E features of the text model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compile.config import VisionConfig
from compile.mlir import Scalar, Tensor
from compile.row_major import Weights

HIDDEN_SCORE = -1e4  # of padding: finite in f16


def activation(x: Scalar, name: str, exp: Callable[[Scalar], Scalar] | None = None) -> Scalar:
    """GELU in its approximations by tanh, or by a logistic function ("quick"); both are x times a
    logistic function (Hendrycks and Gimpel 2016)."""
    exp = exp or (lambda y: y.math("exp"))
    if name == "gelu_tanh":
        z = (x * x * 0.044715 + 1.0) * x * (2 * math.sqrt(2 / math.pi))
    else:
        assert name == "quick_gelu"
        z = x * 1.702
    return x / (exp(z * -1.0) + 1.0)


def gelu(x: Scalar) -> Scalar:
    return x * 0.5 * ((x * math.sqrt(0.5)).math("erf") + 1.0)


class VisionEmitter:
    """Declares a tower's parameters among `weights`; `encode` writes it."""

    def __init__(self, config: VisionConfig, text_hidden: int, weights: Weights, tile: int) -> None:
        self.config, self.text_hidden, self.w, self.b = config, text_hidden, weights, weights.b
        self.num_padded = -(-config.num_positions // tile) * tile  # C
        self._declare()

    def _declare(self) -> None:
        c, w = self.config, self.w
        hidden, inner = c.hidden_size, c.intermediate_size
        w.matrix("v.patch_embd.weight", hidden, c.patch_elements)
        w.vector("v.position_embd.weight", c.num_positions, hidden)
        if c.has_class_token:
            w.vector("v.class_embd", hidden)
            self._declare_norm("v.pre_ln")
        else:
            w.vector("v.patch_embd.bias", hidden)
        for i in range(c.num_layers):
            for name in ("ln1", "ln2"):
                self._declare_norm(f"v.blk.{i}.{name}")
            self._declare_linear(f"v.blk.{i}.attn_qkv", 3 * hidden, hidden)
            self._declare_linear(f"v.blk.{i}.attn_out", hidden, hidden)
            self._declare_linear(f"v.blk.{i}.ffn_up", inner, hidden)
            self._declare_linear(f"v.blk.{i}.ffn_down", hidden, inner)
        if c.family == "llava":
            self._declare_linear("mm.1", self.text_hidden, hidden)
            self._declare_linear("mm.2", self.text_hidden, self.text_hidden)
        else:
            self._declare_norm("v.post_ln")
            w.matrix("mm.fc.weight", self.text_hidden, hidden * c.scale_factor**2)

    def _declare_norm(self, name: str) -> None:
        for part in ("weight", "bias"):
            self.w.vector(f"{name}.{part}", self.config.hidden_size)

    def _declare_linear(self, name: str, rows: int, cols: int) -> None:
        self.w.matrix(f"{name}.weight", rows, cols)
        self.w.vector(f"{name}.bias", rows)

    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings [N, tokens, E] f32 of pixels [N, 3, size, size]."""
        n = pixels.shape[0]
        x = self._embed(pixels)
        for i in range(self.config.num_layers):
            x = self._layer(x, f"v.blk.{i}")
        x = self._project(self.b.expand(x, 0, n, self.num_padded))
        return self.b.expand(x, 0, n, self.config.tokens_per_tile)

    # The tower

    def _embed(self, pixels: Tensor) -> Tensor:
        """The residual stream [N*C, H]: patches and their positions."""
        b, c = self.b, self.config
        n, hidden = pixels.shape[0], c.hidden_size
        patches = self.w.linear(self._unfold(pixels), "v.patch_embd.weight")
        patches = b.expand(patches, 0, n, c.num_patches)
        positions, first = self.w.load("v.position_embd.weight"), int(c.has_class_token)
        extra = self.w.load("v.class_embd" if first else "v.patch_embd.bias")

        def element() -> Scalar:
            i, t, h = (b.position(letter) for letter in "nth")
            patch = (t - first).clamp(0, b.scalar(c.num_patches - 1, "index"))
            x, more = b.extract(patches, i, patch, h), b.extract(extra, h)
            x = t.equals(0).select(more, x) if first else x + more
            last = b.scalar(c.num_positions - 1, "index")
            return x + b.extract(positions, t.minimum(last), h)

        x = b.generic("->nth", [], (n, self.num_padded, hidden), "f32", element)
        x = b.collapse(x, 0, 2)
        return self._norm(x, "v.pre_ln", "f32") if first else x

    def _unfold(self, pixels: Tensor) -> Tensor:
        """Patches [N*P, 3*p*p], channel by channel, as the left operand of a product."""
        b, size, across = self.b, self.config.patch_size, self.config.patches_across

        def element() -> Scalar:
            i, patch, k = (b.position(letter) for letter in "npk")
            y = patch // across * size + k % (size * size) // size
            x = patch % across * size + k % size
            return b.extract(pixels, i, k // (size * size), y, x).to(self.w.dtype)

        shape = (pixels.shape[0], self.config.num_patches, self.config.patch_elements)
        return b.collapse(b.generic("->npk", [], shape, self.w.dtype, element), 0, 2)

    def _layer(self, x: Tensor, name: str) -> Tensor:
        b, c, dtype = self.b, self.config, self.w.dtype
        y = self._linear(self._norm(x, f"{name}.ln1", dtype), f"{name}.attn_qkv")
        y = b.generic("tk->tk", [y], y.shape, dtype, lambda v: v.to(dtype))
        rows = int(x.shape[0])
        y = b.expand(b.expand(y, 1, 3, c.num_heads, c.head_dim), 0, rows // self.num_padded,
                     self.num_padded)  # fmt: skip
        y = b.collapse(b.collapse(self._attend(y), 2, 2), 0, 2)  # [N*C, H]
        x = self._linear(y, f"{name}.attn_out", x)
        y = self._linear(self._norm(x, f"{name}.ln2", dtype), f"{name}.ffn_up")
        y = b.generic("tk->tk", [y], y.shape, dtype,
                      lambda v: activation(v, c.activation).to(dtype))  # fmt: skip
        return self._linear(y, f"{name}.ffn_down", x)

    def _attend(self, heads: Tensor) -> Tensor:
        """Attention of all positions to all: [N, C, heads, D], of queries, keys and values
        [N, C, 3, heads, D]."""
        b, c, dtype = self.b, self.config, self.w.dtype
        q, k, v = (b.slice(heads, 2, i, 1, drop=True) for i in range(3))
        mask, spec = None, "nthd,nchd,nchv->nthv"
        if self.num_padded > c.num_positions:
            spec = "nthd,nchd,nchv,c->nthv"
            last = b.scalar(c.num_positions, "index")
            mask = b.generic(
                "->c", [], (self.num_padded,), dtype,
                lambda: b.position("c").less(last).select(
                    b.scalar(0.0, dtype), b.scalar(HIDDEN_SCORE, dtype)),
            )  # fmt: skip
        return b.attention("nhtdcv", spec, q, k, v, 1 / math.sqrt(c.head_dim), mask, dtype)

    # What becomes of it

    def _project(self, x: Tensor) -> Tensor:
        """[N*tokens, E] f32, of the residual stream [N, C, H]."""
        b, c, dtype = self.b, self.config, self.w.dtype
        n = x.shape[0]
        if c.family == "llava":
            x = b.slice(x, 1, 1, c.num_patches)
            x = b.generic("nth->nth", [x], x.shape, dtype, lambda v: v.to(dtype))
            x = self._linear(b.collapse(x, 0, 2), "mm.1")
            x = b.generic("tk->tk", [x], x.shape, dtype, lambda v: gelu(v).to(dtype))
            return self._linear(x, "mm.2")
        x = b.expand(self._norm(b.collapse(x, 0, 2), "v.post_ln", dtype), 0, n, self.num_padded)
        return self.w.linear(b.collapse(self._shuffle(x), 0, 2), "mm.fc.weight")

    def _shuffle(self, x: Tensor) -> Tensor:
        """Squares of s*s patches as one: [N, P/s^2, s^2*H] (pixel shuffle, Shi et al. 2016)."""
        b, c = self.b, self.config
        s, across, hidden = c.scale_factor, c.patches_across, c.hidden_size

        def element() -> Scalar:
            i, t, k = (b.position(letter) for letter in "ntk")
            y = t // (across // s) * s + k // (s * hidden)
            column = t % (across // s) * s + k // hidden % s
            return b.extract(x, i, y * across + column, k % hidden)

        shape = (x.shape[0], c.tokens_per_tile, s * s * hidden)
        return b.generic("->ntk", [], shape, x.dtype, element)

    # Building blocks

    def _norm(self, x: Tensor, name: str, dtype: str) -> Tensor:
        """Layer norm of x [T, H] f32."""
        b, count = self.b, int(x.shape[1])
        totals = b.generic("th->t", [x], x.shape[:1], "f32", lambda v, acc: acc + v, init=0.0)

        def square(v: Scalar, total: Scalar, acc: Scalar) -> Scalar:
            distance = v - total * (1 / count)
            return acc + distance * distance

        squares = b.generic("th,t->t", [x, totals], x.shape[:1], "f32", square, init=0.0)

        def scale(v: Scalar, total: Scalar, around: Scalar, w: Scalar, bias: Scalar) -> Scalar:
            inverse = (around * (1 / count) + self.config.norm_eps).math("rsqrt")
            return ((v - total * (1 / count)) * inverse * w + bias).to(dtype)

        both = [self.w.load(f"{name}.{part}") for part in ("weight", "bias")]
        return b.generic("th,t,t,h,h->th", [x, totals, squares, *both], x.shape, dtype, scale)

    def _linear(self, x: Tensor, name: str, residual: Tensor | None = None) -> Tensor:
        """x [T, K] times a matrix [N, K], plus its bias and `residual`: [T, N] f32."""
        product = self.w.linear(x, f"{name}.weight", residual)
        bias = self.w.load(f"{name}.bias")
        return self.b.generic("tn,n->tn", [product, bias], product.shape, "f32", Scalar.__add__)
