"""The layers of a Llama over a paged KV cache, for GPUs.

Shapes: N rows of a batch, S tokens a row, T = N*S, H hidden features, KH KV heads, D head_dim.
Prefill computes whole tiles of tokens: there S is a multiple of a tile's size, the rest being
padding that nothing reads.

A page of the cache is [L, P, 2, KH, D]: one token of one layer is one contiguous row of keys, then
values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compile.gpu.attention import attend
from compile.gpu.batch import Batch, tokens_of_row, whole_tiles
from compile.gpu.kernel import Kernels
from compile.gpu.linear import Weights
from compile.gpu.pages import Heads
from compile.gpu.prefill_attention import attend_prefill
from compile.mlir.activations import gated
from compile.mlir.builder import Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from compile.options import ModelOptions

# What a layer attends to and the cache, of queries, keys and values, the cache, and its number
Attend = Callable[[Tensor, Tensor, Dim], tuple[Tensor, Tensor]]


class Decoder:
    """Writes all layers of a model into a function, for rows of tokens."""

    def __init__(
        self, config: LlamaConfig, options: ModelOptions, weights: Weights, kernels: Kernels,
        tile: int,
    ) -> None:  # fmt: skip
        self.config, self.options = config, options
        self.weights, self.b, self._kernels, self.tile = weights, weights.b, kernels, tile

    def batch(self, args: Mapping[str, Tensor]) -> Batch:
        """The rows of a call whose arguments are those of `abi.function`; tokens are padded to
        whole tiles."""
        b, tokens = self.b, args["tokens"]
        # Before all work, which they would cut in pieces
        layers = [b.hidden(i) for i in range(self.config.num_layers)]
        n, num_tokens = tokens.shape
        if isinstance(num_tokens, str):
            size = whole_tiles(b, num_tokens, tokens_of_row(self.tile, int(n)))
            tokens = b.pad(tokens, 1, size, 0)
        return Batch(layers, tokens, args["start_pos"], args["seq_lens"], args["seq_block_ids"],
                     args.get("embeds"))  # fmt: skip

    def run(self, batch: Batch, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream [T, H] f32 after all layers, and the cache [rows, 2*KH*D]."""
        attention = self._attention_of(batch)
        x = self._embed(batch)
        for i in range(self.config.num_layers):
            heads = self.weights.norm_linear(
                x, f"blk.{i}.attn_norm.weight", f"blk.{i}.attn_qkv.weight", self.config.rms_eps
            )
            out, cache = attention(heads, cache, batch.layers[i])
            x = self.weights.linear(out, f"blk.{i}.attn_output.weight", x)
            x = self._mlp(x, i)
        return x, cache

    def _attention_of(self, batch: Batch) -> Attend:
        """How layers attend in a call: over the pages where they lie."""
        heads, dtype = Heads.of(self.config, self.options), self.weights.dtype
        rows = [self.weights.load("rope"), batch.start, batch.seq_lens, batch.page_ids]
        if batch.seq_len == 1:
            return lambda qkv, cache, layer: attend(
                self._kernels, heads, dtype, [qkv, *rows], cache, layer
            )
        return lambda qkv, cache, layer: attend_prefill(
            self._kernels, heads, dtype, batch.seq_len, [qkv, *rows], cache, layer
        )

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, H] f32: rows of the embedding, or those that were given."""
        b, name, embeds = self.b, "token_embd.weight", batch.embeds
        shape = (*batch.tokens.shape, self.config.hidden_size)
        rows = None
        if self.weights.is_quantized(name):
            rows = self.weights.rows_of(name, b.collapse(batch.tokens, 0, 2))
            if embeds is None:
                return rows
        table = self.weights.load(name)

        def lookup(token: Scalar) -> Scalar:
            h, none = b.position("h"), b.scalar(0, "i64")
            row = token.to("index").clamp(0, b.scalar(self.config.vocab_size - 1, "index"))
            if rows is None:
                x = b.extract(table, row, h).to("f32")
            else:
                at = b.position("n") * b.index(shape[1]) + b.position("s")
                x = b.extract(rows, at, h)
            if embeds is None:
                return x
            is_given = token.less(none)
            s = is_given.select(b.position("s"), b.scalar(0, "index"))
            return is_given.select(b.extract(embeds, b.position("n"), s, h), x)

        return b.collapse(b.generic("ns->nsh", [batch.tokens], shape, "f32", lookup), 0, 2)

    def _mlp(self, x: Tensor, i: int) -> Tensor:
        """x + down(silu(gate(norm(x))) * up(norm(x)))"""
        c, b, matrix = self.config, self.b, f"blk.{i}.ffn_gate_up.weight"
        gate_up = self.weights.norm_linear(
            x, f"blk.{i}.ffn_norm.weight", matrix, c.rms_eps, is_gated=True
        )
        if self.weights.multiplies_gates(x, matrix):
            return self.weights.linear(gate_up, f"blk.{i}.ffn_down.weight", x)
        gate_up = b.expand(gate_up, 1, 2, c.intermediate_size)  # gate features, then up

        def silu_times() -> Scalar:
            gate, up = (
                b.extract(gate_up, b.position("t"), b.scalar(j, "index"), b.position("f"))
                for j in (0, 1)
            )
            return gated(gate, up).to(self.weights.dtype)

        shape = (x.shape[0], c.intermediate_size)
        hidden = b.generic("->tf", [], shape, self.weights.dtype, silu_times)
        return self.weights.linear(hidden, f"blk.{i}.ffn_down.weight", x)
