"""Llama for CPUs: three kernels, of which each holds the whole model, as functions of the ABI."""

from __future__ import annotations

from dataclasses import replace

from compile import abi
from compile.config import LlamaConfig
from compile.cpu_attention import KVLayout
from compile.cpu_forward import Forward, Kind, Shape
from compile.matmul import Vectors
from compile.mlir import Builder
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
        for name, size in self.options.calls:
            plain = prefill_next if name.endswith("_next") else prefill
            self._function(b, name, size, decode_next if name.startswith("decode") else plain)
        return "\n".join([*(kernel.layout() for kernel in kernels), b.text("module")])

    def _function(self, b: Builder, name: str, n: int, kernel: Forward) -> None:
        hidden = self.config.hidden_size
        size = self.options.page_size, hidden
        with abi.function(b, name, n, *size, num_summed=4) as (args, is_next):
            cache = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            weights = b.tensor(
                f"util.global.load @weights : tensor<{self.num_weight_bytes}xi8>",
                (self.num_weight_bytes,),
                "i8",
            )
            if not is_next:
                args["scales"] = b.fill(1.0, (n,), "f32")
            if self._shape.takes_embeds and not kernel.kind.is_decode and "embeds" not in args:
                args["embeds"] = b.fill(0.0, (1, 1, hidden), "f32")
            results, cache = kernel.call(b, args, weights, cache)
            results = results if is_next else results[:1]
            abi.return_results(b, results, abi.store_cache(b, cache))
