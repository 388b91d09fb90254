"""Vision towers that make a Llama's embeddings of pixels, emitted as tensor operations, for GPUs.

SigLIP with pixel shuffle and a linear connector (Idefics3, Laurencon et al. 2024), or CLIP with a
two-layer projector (LLaVA-1.5, Liu et al. 2023). Shapes: N tiles, P patches of a tile, and C
positions, which are CLIP's class token, patches, and padding to O whole blocks of B, a GPU's tile;
H hidden features, E features of the text model.

N and O are hidden from IREE, which as in prefill sees multiples of one tile. By the sizes it would
make tiles that do not fit the registers of RDNA; and batches of all sizes share their kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compile.gpu.linear import Weights, whole_subgroups
from compile.mlir.activations import activation, gelu
from compile.mlir.builder import Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import VisionConfig

HIDDEN_SCORE = -1e4  # of padding: finite in f16


class VisionEmitter:
    """Declares a tower's parameters among `weights`; `encode` writes it."""

    def __init__(
        self, config: VisionConfig, text_hidden: int, weights: Weights, block: int
    ) -> None:
        self.config, self.text_hidden, self.w, self.b = config, text_hidden, weights, weights.b
        self.block = block
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
        b, c = self.b, self.config
        n = b.hidden(int(pixels.shape[0]))
        self._positions, self._tokens = (
            (n, b.hidden(-(-size // self.block)), self.block)
            for size in (c.num_positions, c.tokens_per_tile)
        )
        x = self._embed(pixels)
        for i in range(c.num_layers):
            x = self._layer(x, f"v.blk.{i}")
        if c.family == "llava":
            x = self._by_tile(self._projected(x), self._positions)
            return b.slice(x, 1, 1, c.tokens_per_tile)
        return b.slice(self._by_tile(self._connected(x), self._tokens), 1, 0, c.tokens_per_tile)

    def _by_tile(self, x: Tensor, blocks: Sequence[Dim]) -> Tensor:
        """Rows of all tiles as [N, rows, features]."""
        return self.b.collapse(self.b.expand(x, 0, *blocks), 1, 2)

    # The tower

    def _embed(self, pixels: Tensor) -> Tensor:
        """The residual stream [N*C, H]: patches and their positions."""
        b, c, of_tile = self.b, self.config, self._positions[1:]
        patches = self.w.linear(self._unfold(pixels), "v.patch_embd.weight")
        patches = b.expand(patches, 0, *self._positions)
        positions = b.pad(self.w.load("v.position_embd.weight"), 0, b.product(*of_tile), 0)
        positions = b.expand(positions, 0, *of_tile)
        extra = self.w.load("v.class_embd" if c.has_class_token else "v.patch_embd.bias")

        def add(patch: Scalar, position: Scalar, more: Scalar) -> Scalar:
            if c.has_class_token:
                return self._position("o", "t").equals(0).select(more, patch) + position
            return patch + more + position

        x = b.generic("noth,oth,h->noth", [patches, positions, extra], patches.shape, "f32", add)
        x = b.collapse(x, 0, 3)
        return self._norm(x, "v.pre_ln", "f32") if c.has_class_token else x

    def _unfold(self, pixels: Tensor) -> Tensor:
        """Patches [N*C, 3*p*p], channel by channel, as the left operand of a product.

        The class token and padding have some as well, which nobody reads. Columns are padded to
        what matrix instructions take, for weights that are zero.
        """
        b, c = self.b, self.config
        size, across, first = c.patch_size, c.patches_across, int(c.has_class_token)

        def element() -> Scalar:
            i, t, k = b.position("n"), self._position("o", "t"), b.position("k")
            patch = (t - first).clamp(0, b.scalar(c.num_patches - 1, "index"))
            k = k.minimum(b.scalar(c.patch_elements - 1, "index"))
            y = patch // across * size + k % (size * size) // size
            x = patch % across * size + k % size
            return b.extract(pixels, i, k // (size * size), y, x).to(self.w.dtype)

        shape = (*self._positions, whole_subgroups(c.patch_elements))
        return b.collapse(b.generic("->notk", [], shape, self.w.dtype, element), 0, 3)

    def _position(self, block: str, offset: str) -> Scalar:
        """Inside a `generic` body, of a block and an offset in it."""
        return self.b.position(block) * self.block + self.b.position(offset)

    def _layer(self, x: Tensor, name: str) -> Tensor:
        b, c, dtype = self.b, self.config, self.w.dtype
        y = self._linear(self._norm(x, f"{name}.ln1", dtype), f"{name}.attn_qkv")
        y = b.generic("tk->tk", [y], y.shape, dtype, lambda v: v.to(dtype))
        y = b.expand(b.expand(y, 1, 3, c.num_heads, c.head_dim), 0, *self._positions)
        y = b.collapse(b.collapse(self._attend(y), 3, 2), 0, 3)  # [N*C, H]
        x = self._linear(y, f"{name}.attn_out", x)
        y = self._linear(self._norm(x, f"{name}.ln2", dtype), f"{name}.ffn_up")
        y = b.generic("tk->tk", [y], y.shape, dtype,
                      lambda v: activation(v, c.activation).to(dtype))  # fmt: skip
        return self._linear(y, f"{name}.ffn_down", x)

    def _attend(self, heads: Tensor) -> Tensor:
        """Attention of all positions to all: [N, O, B, heads, D], of queries, keys and values
        [N, O, B, 3, heads, D]."""
        b, c, dtype = self.b, self.config, self.w.dtype
        heads = b.pad(heads, 5, whole_subgroups(c.head_dim), 0)
        q, k, v = (b.slice(heads, 3, i, 1, drop=True) for i in range(3))
        mask, spec = None, "nothd,nbchd,nbchv->nothv"
        if c.num_positions % self.block:
            spec = "nothd,nbchd,nbchv,bc->nothv"
            last = b.scalar(c.num_positions, "index")
            mask = b.generic(
                "->bc", [], self._positions[1:], dtype,
                lambda: self._position("b", "c").less(last).select(
                    b.scalar(0.0, dtype), b.scalar(HIDDEN_SCORE, dtype)),
            )  # fmt: skip
        out = b.attention("nhotdbcv", spec, q, k, v, 1 / math.sqrt(c.head_dim), mask, "f32")
        out = b.slice(out, 4, 0, c.head_dim)
        return b.generic("nothd->nothd", [out], out.shape, dtype, lambda v: v.to(dtype))

    # What makes it embeddings, rows of E features

    def _projected(self, x: Tensor) -> Tensor:
        b, dtype = self.b, self.w.dtype
        x = b.generic("th->th", [x], x.shape, dtype, lambda v: v.to(dtype))
        x = self._linear(x, "mm.1")
        x = b.generic("tk->tk", [x], x.shape, dtype, lambda v: gelu(v).to(dtype))
        return self._linear(x, "mm.2")

    def _connected(self, x: Tensor) -> Tensor:
        x = self._norm(x, "v.post_ln", self.w.dtype)
        x = self._shuffle(self._by_tile(x, self._positions))
        return self.w.linear(x, "mm.fc.weight", num_rows=self.config.tokens_per_tile)

    def _shuffle(self, x: Tensor) -> Tensor:
        """Squares of s*s patches of [N, C, H] as one: tokens [N*T, s^2*H] with padding to whole
        blocks (pixel shuffle, Shi et al. 2016)."""
        b, c = self.b, self.config
        s, across, hidden = c.scale_factor, c.patches_across, c.hidden_size

        def element() -> Scalar:
            i, t, k = b.position("n"), self._position("o", "t"), b.position("k")
            t = t.minimum(b.scalar(c.tokens_per_tile - 1, "index"))
            y = t // (across // s) * s + k // (s * hidden)
            column = t % (across // s) * s + k // hidden % s
            return b.extract(x, i, y * across + column, k % hidden)

        shape = (*self._tokens, s * s * hidden)
        return b.collapse(b.generic("->notk", [], shape, x.dtype, element), 0, 3)

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
