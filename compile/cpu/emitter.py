"""Llama for CPUs: three kernels, of which each holds the whole model, as functions of the ABI."""

from __future__ import annotations

from dataclasses import replace

from compile.cpu.decoder import Forward, Kind, Shape
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Format
from compile.cpu.vision import Vision, VisionShape
from compile.formats.layout import Parameter
from compile.mlir import abi
from compile.mlir.builder import Builder, Tensor
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import ModelOptions
from compile.target import Vectors
from sf_local.artifact.irpa import num_bytes_together

PREFILL = Kind("prefill", all_logits=True, is_decode=False)
PREFILL_NEXT = Kind("prefill_next", all_logits=False, is_decode=False)
DECODE_NEXT = Kind("decode_next", all_logits=False, is_decode=True)


class CpuLlamaEmitter:
    """Writes one module for `config`, `options` and `vectors`; `emit()` returns its text."""

    def __init__(
        self,
        config: LlamaConfig,
        options: ModelOptions,
        vectors: Vectors,
        vision: VisionConfig | None = None,
    ) -> None:
        self.config, self.options, self.vectors = config, options, vectors
        shape = replace(Shape.of(config, options, vectors), takes_embeds=vision is not None)
        parameters = shape.parameters()
        self._vision = vision and VisionShape(vision, config.hidden_size, _floats(shape), {})
        if self._vision:
            parameters += self._vision.parameters()
        self.parameters: dict[str, Parameter] = {p.name: p for p in parameters}
        ends = [num_bytes_together(p.num_bytes for p in parameters[:i])
                for i in range(len(parameters) + 1)]  # fmt: skip
        self.num_weight_bytes = ends[-1]
        self._offsets = dict(zip(self.parameters, ends, strict=False))
        self._shape = replace(shape, offsets=self._offsets)
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
        layouts = [kernel.layout() for kernel in kernels]
        if self._vision:
            layouts.append(self._images(b, self._vision))
        return "\n".join([*layouts, b.text("module")])

    def _images(self, b: Builder, shape: VisionShape) -> str:
        """The functions that encode images; their kernel's layout."""
        kernel = Vision(replace(shape, offsets=self._offsets))
        kernel.write(b)
        for size in self.options.image_batch_sizes:
            with abi.image_function(b, size, shape.config.image_size) as pixels:
                abi.return_results(b, [kernel.call(b, pixels, self._load_weights(b))])
        return kernel.layout()

    def _load_weights(self, b: Builder) -> Tensor:
        size = self.num_weight_bytes
        return b.tensor(f"util.global.load @weights : tensor<{size}xi8>", (size,), "i8")

    def _function(self, b: Builder, name: str, n: int, kernel: Forward) -> None:
        hidden = self.config.hidden_size
        size = self.options.page_size, hidden
        with abi.function(b, name, n, *size, num_summed=4) as (args, is_next):
            cache = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            weights = self._load_weights(b)
            if not is_next:
                args["scales"] = b.fill(1.0, (n,), "f32")
            if self._shape.takes_embeds and not kernel.kind.is_decode and "embeds" not in args:
                args["embeds"] = b.fill(0.0, (1, 1, hidden), "f32")
            results, cache = kernel.call(b, args, weights, cache)
            results = results if is_next else results[:1]
            abi.return_results(b, results, abi.store_cache(b, cache))


def _floats(shape: Shape) -> Format:
    """Of matrices that are not quantized."""
    layers, dtype = shape.layers, shape.options.kv_dtype
    return Format(dtype, shape.vectors) if layers.is_quantized else layers
