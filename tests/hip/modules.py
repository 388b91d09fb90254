"""MLIR for GPUs, for tests that need no whole artifact."""

from __future__ import annotations

from dataclasses import replace

from compile.build import BuildOptions
from compile.config import LlamaConfig
from compile.llama import LlamaEmitter
from compile.mlir import Tensor, tensor_type
from compile.model import SUMMARY, ModelOptions
from compile.target import resolve_target


def model_emitter(config: LlamaConfig, options: BuildOptions) -> LlamaEmitter:
    """Of a whole model, as `compile.build` emits it for `options.target`."""
    dtype = options.weight_dtype or "f16"
    model = ModelOptions(
        dtype, options.kv_dtype or dtype, options.page_size, options.prefill_batch_sizes,
        options.decode_batch_sizes, options.max_seq_len or config.max_seq_len,
    )  # fmt: skip
    return LlamaEmitter(config, model, resolve_target(options.target).tile)


def summing_module(config: LlamaConfig, vocab_size: int, num_rows: int) -> str:
    """A function `sum_up` alone, of logits [n, V] and scales [n]: what a model makes of them.

    Its result [n, 1 + 2 * blocks] is the best token, the maxima, and the sums.
    """
    options = BuildOptions("gfx942", weight_dtype="f32")
    emitter = model_emitter(replace(config, vocab_size=vocab_size), options)
    logits = Tensor("%logits", (num_rows, vocab_size), "f32")
    scales = Tensor("%scales", (num_rows,), "f32")
    result = tensor_type((num_rows, 1 + 2 * -(-vocab_size // SUMMARY)), "f32")
    arguments = ", ".join(f"{argument.name}: {argument.type}" for argument in (logits, scales))
    with emitter.b.block(f"func.func @sum_up({arguments}) -> {result} {{"):
        sums = emitter._sums(logits, scales)
        emitter.b.emit(f"return {sums.name} : {sums.type}")
    return emitter.b.text("summing")
