"""A Llama for GPUs: one MLIR module with the functions of the ABI, as tensor operations.

IREE writes most kernels, and `compile.gpu.kernel` those of our own. Matrices are row-major and
products plain contractions, in which IREE finds what the chip's matrix instructions multiply.
"""

from __future__ import annotations

from compile.formats.layout import DTYPES, Parameter
from compile.gpu.decoder import Decoder
from compile.gpu.kernel import Kernels
from compile.gpu.linear import Weights
from compile.gpu.logits import compute_logits, last_rows
from compile.gpu.summary import summarize
from compile.gpu.vision import VisionEmitter
from compile.mlir import abi
from compile.mlir.builder import Builder
from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import decoder_tensors
from compile.options import ModelOptions
from compile.target import Target


class LlamaEmitter:
    """Writes one module for `config`, `options` and `target`; `emit()` returns its text.

    vision: the tower of a model that takes images. plain: our own kernels in plain loops, as a
    target that is a CPU gets them; tests compile this for one.
    """

    def __init__(
        self,
        config: LlamaConfig,
        options: ModelOptions,
        target: Target,
        vision: VisionConfig | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self.config, self.options = config, options
        self._target, self._tower = target, vision
        self.b = Builder()
        self.kernels = Kernels(self.b, target, plain=plain)
        tile = target.tile
        self.weights = Weights(self.b, _activations(options), self.kernels)
        self.decoder = Decoder(config, options, self.weights, self.kernels, tile)
        self.kv_row = 2 * config.num_kv_heads * config.head_dim
        self.page_elements = config.num_layers * options.page_size * self.kv_row
        tensors = decoder_tensors(config, context=options.max_seq_len)
        self.weights.add(tensors.all, options.dtype_of)
        self._vision = vision and VisionEmitter(vision, config.hidden_size, self.weights, tile)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All parameters by name, in the order of the archive."""
        return self.weights.parameters

    def emit(self) -> str:
        """The module's text. Call it once."""
        self.weights.declare()
        for name, size in self.options.calls:
            self._function(name, size)
        if self._vision:
            for size in self.options.image_batch_sizes:
                with abi.image_function(self.b, size, self._vision.config.image_size) as pixels:
                    abi.return_results(self.b, [self._vision.encode(pixels)])
        return self.kernels.write() + self.b.text("module")

    def plain(self) -> LlamaEmitter:
        """An emitter of the same module in which our own kernels are plain loops."""
        return LlamaEmitter(self.config, self.options, self._target, self._tower, plain=True)

    def _function(self, name: str, n: int) -> None:
        """A function for n rows: it returns all logits, or with "_next" those after each row's
        last token, and their summary."""
        b, c = self.b, self.config
        with abi.function(
            b, name, n, self.options.page_size, c.hidden_size, num_summed=2
        ) as (args, is_next):  # fmt: skip
            pages = abi.import_cache(b, self.page_elements, self.options.kv_dtype)
            slots = c.num_layers * self.options.page_size
            cache = b.collapse(b.expand(pages, 1, slots, self.kv_row), 0, 2)
            batch = self.decoder.batch(args)
            x, cache = self.decoder.run(batch, cache)
            if is_next:
                x = last_rows(b, x, batch.start, batch.seq_lens, batch.seq_len)
                logits = compute_logits(self.weights, c, x)
                results = [
                    b.expand(logits, 0, n, 1),
                    summarize(self.kernels, logits, args["scales"]),
                ]
            else:
                logits = b.expand(compute_logits(self.weights, c, x), 0, n, batch.seq_len)
                results = [b.slice(logits, 1, 0, args["tokens"].shape[1])]
            cache = b.collapse(b.expand(cache, 0, pages.shape[0], slots), 1, 2)
            abi.return_results(b, results, abi.store_cache(b, cache))


def _activations(options: ModelOptions) -> str:
    """The dtype of activations: that of the weights, and f16 where these are quantized."""
    return options.weight_dtype if options.weight_dtype in DTYPES else "f16"
