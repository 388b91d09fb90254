"""CpuLlamaEmitter: writes a Llama as a module for CPUs.

Each of three kernels holds the whole model: for prefill with all logits, for prefill with the last
logits, and for decode. The functions of the artifact call them.
"""

from __future__ import annotations

from dataclasses import replace

from compile.cpu.decoder import DecoderKernel
from compile.cpu.decoder_layout import DecoderLayout
from compile.cpu.kv_layout import KVLayout
from compile.cpu.matmul import Format
from compile.cpu.row_tables import KernelKind
from compile.cpu.vision import VisionKernel, VisionShape
from compile.formats.layout import Parameter
from compile.mlir import abi
from compile.mlir.builder import Builder, Tensor
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import ModelOptions
from compile.target import Vectors
from sf_local.artifact.irpa import num_bytes_together

PREFILL = KernelKind("prefill", all_logits=True, is_decode=False)
PREFILL_NEXT = KernelKind("prefill_next", all_logits=False, is_decode=False)
DECODE_NEXT = KernelKind("decode_next", all_logits=False, is_decode=True)


class CpuLlamaEmitter:
    """Writes one module for `config`, `options` and `vectors`; `emit()` returns its text.

    parameters: by name, in the order of the archive. page_elements: of one page of the KV cache.
    """

    def __init__(
        self,
        config: LlamaConfig,
        options: ModelOptions,
        vectors: Vectors,
        vision: VisionConfig | None = None,
    ) -> None:
        self.config, self.options, self.vectors = config, options, vectors
        model = replace(DecoderLayout.of(config, options, vectors), takes_embeds=vision is not None)
        parameters = model.parameters()
        self._vision = vision and VisionShape(vision, config.hidden_size, _floats(model), {})
        if self._vision:
            parameters += self._vision.parameters()
        self.parameters: dict[str, Parameter] = {p.name: p for p in parameters}
        ends = [num_bytes_together(p.num_bytes for p in parameters[:i])
                for i in range(len(parameters) + 1)]  # fmt: skip
        self.num_weight_bytes = ends[-1]
        self._offsets = dict(zip(self.parameters, ends, strict=False))
        self._model = replace(model, offsets=self._offsets)
        self.page_elements = KVLayout(
            config, options.page_size, options.kv_dtype, vectors
        ).page_elements

    def emit(self) -> str:
        """The module's MLIR."""
        b = Builder()
        b.emit(
            f'util.global private @weights = #flow.parameter.named<"model"::"model"> : '
            f"tensor<{self.num_weight_bytes}xi8>"
        )
        kinds = PREFILL, PREFILL_NEXT, DECODE_NEXT
        kernels = [DecoderKernel(self._model, kind) for kind in kinds]
        for kernel in kernels:
            kernel.write(b)
        prefill, prefill_next, decode_next = kernels
        for name, size in self.options.calls:
            plain = prefill_next if name.endswith("_next") else prefill
            self._function(b, name, size, decode_next if name.startswith("decode") else plain)
        layouts = [kernel.layout() for kernel in kernels]
        if self._vision:
            layouts.append(self._image_functions(b, self._vision))
        return "\n".join([*layouts, b.text("module")])

    def _image_functions(self, b: Builder, shape: VisionShape) -> str:
        """Write the functions that encode images, and return their kernel's layout."""
        kernel = VisionKernel(replace(shape, offsets=self._offsets))
        kernel.write(b)
        for size in self.options.image_batch_sizes:
            with abi.image_function(b, size, shape.config.image_size) as pixels:
                abi.return_results(b, [kernel.call(b, pixels, self._load_weights(b))])
        return kernel.layout()

    def _load_weights(self, b: Builder) -> Tensor:
        size = self.num_weight_bytes
        return b.tensor(f"util.global.load @weights : tensor<{size}xi8>", (size,), "i8")

    def _function(self, b: Builder, name: str, n: int, kernel: DecoderKernel) -> None:
        hidden = self.config.hidden_size
        size = self.options.page_size, hidden
        with abi.function(b, name, n, *size, num_summed=4) as (args, is_next):
            cache = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            weights = self._load_weights(b)
            if not is_next:
                args["scales"] = b.fill(1.0, (n,), "f32")
            if kernel.takes_embeds and "embeds" not in args:
                args["embeds"] = b.fill(0.0, (1, 1, hidden), "f32")
            results, cache = kernel.call(b, args, weights, cache)
            results = results if is_next else results[:1]
            abi.return_results(b, results, abi.store_cache(b, cache))


def _floats(model: DecoderLayout) -> Format:
    """The format of matrices that are not quantized: a vision tower's."""
    layers, dtype = model.layers, model.options.kv_dtype
    return Format(dtype, model.vectors) if layers.is_quantized else layers
