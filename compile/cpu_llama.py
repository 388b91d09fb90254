"""Llama for CPUs: three kernels, of which each holds the whole model, as functions of the ABI."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from compile import abi
from compile.config import LlamaConfig
from compile.cpu_attention import KVLayout
from compile.cpu_forward import Forward, Kind, Shape
from compile.matmul import Vectors
from compile.mlir import Builder, Dim
from compile.model import ModelOptions, Parameter
from sf_local.irpa import num_bytes_together

PREFILL = Kind("prefill", all_logits=True, is_decode=False)
PREFILL_NEXT = Kind("prefill_next", all_logits=False, is_decode=False)
DECODE_NEXT = Kind("decode_next", all_logits=False, is_decode=True)


class CpuLlamaEmitter:
    """Writes one module for `config`, `options` and `vectors`; `emit()` returns its text."""

    def __init__(self, config: LlamaConfig, options: ModelOptions, vectors: Vectors) -> None:
        self.config, self.options, self.vectors = config, options, vectors
        shape = Shape.of(config, options, vectors)
        parameters = shape.parameters()
        self.parameters: dict[str, Parameter] = {p.name: p for p in parameters}
        ends = [num_bytes_together(p.num_bytes for p in parameters[:i])
                for i in range(len(parameters) + 1)]  # fmt: skip
        self.num_weight_bytes = ends[-1]
        self._shape = replace(shape, offsets=dict(zip(self.parameters, ends, strict=False)))
        self.page_elements = KVLayout(
            config, options.page_size, options.kv_dtype, vectors
        ).page_elements

    @cached_property
    def function_names(self) -> list[str]:
        prefill, decode = self.options.prefill_batch_sizes, self.options.decode_batch_sizes
        return [
            f"{name}{kind}_bs{size}"
            for name, sizes in (("prefill", prefill), ("decode", decode))
            for size in sizes
            for kind in ("", "_next")
        ]

    def emit(self) -> str:
        b = Builder()
        b.emit(
            f'util.global private @weights = #flow.parameter.named<"model"::"model"> : '
            f"tensor<{self.num_weight_bytes}xi8>"
        )
        kernels = [Forward(self._shape, kind) for kind in (PREFILL, PREFILL_NEXT, DECODE_NEXT)]
        for kernel in kernels:
            kernel.write(b)
        prefill, prefill_next, decode_next = kernels
        for size in self.options.prefill_batch_sizes:
            self._function(b, f"prefill_bs{size}", size, prefill)
            self._function(b, f"prefill_next_bs{size}", size, prefill_next)
        for size in self.options.decode_batch_sizes:
            self._function(b, f"decode_bs{size}", size, decode_next)
            self._function(b, f"decode_next_bs{size}", size, decode_next)
        return "\n".join([*(kernel.layout() for kernel in kernels), b.text("module")])

    def _function(self, b: Builder, name: str, n: int, kernel: Forward) -> None:
        """A function of the ABI, or with `_next` one that takes scales and sums logits up."""
        is_decode, is_next = kernel.kind.is_decode, "_next" in name
        tokens: tuple[Dim, ...] = (n, 1) if is_decode else (n, f"%{self.options.page_size}")
        shapes: dict[str, tuple[tuple[Dim, ...], str]] = {"tokens": (tokens, "i64")}
        for argument in ("seq_lens", "start_pos") if is_decode else ("start_pos", "seq_lens"):
            shapes[argument] = ((n,), "i64")
        shapes["seq_block_ids"] = ((n, "%1"), "i64")
        if is_next:
            shapes["scales"] = ((n,), "f32")
        with abi.function(b, name, shapes, 4 if is_next else 1) as args:
            cache = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            weights = b.tensor(
                f"util.global.load @weights : tensor<{self.num_weight_bytes}xi8>",
                (self.num_weight_bytes,),
                "i8",
            )
            if not is_next:
                args["scales"] = b.fill(1.0, (n,), "f32")
            results, cache = kernel.call(b, args, weights, cache)
            abi.return_results(b, results if is_next else results[:1], cache)
