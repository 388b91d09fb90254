"""MLIR for GPUs, for tests that need no whole artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compile.gpu.emitter import LlamaEmitter
from compile.gpu.kernel import Kernels
from compile.gpu.linear import Weights, whole_subgroups
from compile.gpu.summary import summarize
from compile.mlir.builder import Builder, Tensor, tensor_type
from compile.models.spec import LlamaConfig, VisionConfig
from compile.options import BuildOptions, ModelOptions
from compile.target import resolve_target
from sf_local.artifact.manifest import LOGITS_BLOCK


def model_emitter(
    config: LlamaConfig, options: BuildOptions, vision: VisionConfig | None = None
) -> LlamaEmitter:
    """Of a whole model, as `compile.build` emits it for `options.target`."""
    dtype = options.weight_dtype or "f16"
    model = ModelOptions(
        dtype, options.kv_dtype or dtype, options.page_size, options.prefill_batch_sizes,
        options.decode_batch_sizes, options.max_seq_len or config.max_seq_len,
        image_batch_sizes=(options.image_batch_sizes or (1,)) if vision else (),
    )  # fmt: skip
    return LlamaEmitter(config, model, resolve_target(options.target), vision)


def summing_module(chip: str, vocab_size: int, num_rows: int) -> str:
    """A function `sum_up` alone, of logits [n, V] and scales [n]: what a model makes of them.

    Its result [n, 1 + 2 * blocks] is the best token, the maxima, and the sums.
    """
    b = Builder()
    kernels = Kernels(b, resolve_target(chip))
    logits = Tensor("%logits", (num_rows, vocab_size), "f32")
    scales = Tensor("%scales", (num_rows,), "f32")
    result = tensor_type((num_rows, 1 + 2 * -(-vocab_size // LOGITS_BLOCK)), "f32")
    arguments = ", ".join(f"{argument.name}: {argument.type}" for argument in (logits, scales))
    with b.block(f"func.func @sum_up({arguments}) -> {result} {{"):
        sums = summarize(kernels, logits, scales)
        b.emit(f"return {sums.name} : {sums.type}")
    return kernels.write() + b.text("summing")


@dataclass(frozen=True)
class Product:
    """lhs [rows, depth] times a matrix [columns, depth], with or without a residual.

    As for a loaded model, the matrix has been padded to [columns, whole_depth] with zeros.
    """

    rows: int
    columns: int
    depth: int
    has_residual: bool

    @property
    def whole_depth(self) -> int:
        return whole_subgroups(self.depth)


class GivenWeights(Weights):
    """A product's matrix is an argument of its function."""

    def load(self, name: str) -> Tensor:
        return self._given

    def emit_product(self, name: str, product: Product) -> None:
        """A function of lhs, the matrix and a residual [rows, columns] f32."""
        rows, columns = product.rows, product.columns
        lhs = Tensor("%lhs", (rows, product.depth), self.dtype)
        self._given = Tensor("%matrix", (columns, product.whole_depth), self.dtype)
        residual = Tensor("%residual", (rows, columns), "f32")
        arguments = ", ".join(f"{x.name}: {x.type}" for x in (lhs, self._given, residual))
        with self.b.block(f"func.func @{name}({arguments}) -> {residual.type} {{"):
            result = self.linear(lhs, "", residual if product.has_residual else None)
            self.b.emit(f"return {result.name} : {result.type}")


def products_module(dtype: str, products: Mapping[str, Product]) -> str:
    """A function for each product, by its name, as a model for GPUs has it."""
    weights = GivenWeights(Builder(), dtype)
    for name, product in products.items():
        weights.emit_product(name, product)
    return weights.b.text("products")
