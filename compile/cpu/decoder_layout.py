"""DecoderLayout: how a Llama is stored for a CPU, and the sizes that its kernels compute with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from compile.cpu.amx import COLUMNS
from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import Part, padded
from compile.cpu.row_tables import KernelKind
from compile.formats.blocks import BLOCK_TYPES, GROUP
from compile.formats.layout import Parameter
from compile.models.spec import LlamaConfig
from compile.models.tensors import DecoderTensors, ModelTensor, decoder_tensors, matrix_sizes
from compile.options import ModelOptions
from compile.target import Vectors
from sf_local.artifact.manifest import LOGITS_BLOCK


@dataclass(frozen=True)
class DecoderLayout:
    """A model as its kernels see it: formats, sizes and where its parameters lie.

    Features are padded to whole blocks: `hidden` those of the residual, `inner` those inside the
    MLP. layers: the format of most matrices; where others have one of their own, all are quantized.
    offsets: of parameters, in bytes. takes_embeds: negative tokens stand for embeddings that the
    caller gives.
    """

    config: LlamaConfig
    options: ModelOptions
    vectors: Vectors
    layers: Format
    hidden: int
    inner: int
    offsets: dict[str, int]
    takes_embeds: bool = False

    @classmethod
    def of(cls, config: LlamaConfig, options: ModelOptions, vectors: Vectors) -> DecoderLayout:
        """The layout of a model for a CPU, yet without offsets."""
        dtypes = {options.weight_dtype, *options.tensor_dtypes.values()}
        has_half_sums = any(BLOCK_TYPES[d].group < GROUP for d in dtypes & BLOCK_TYPES.keys())
        layers = Format(options.weight_dtype, vectors, has_half_sums=has_half_sums)
        group = GROUP if layers.is_quantized else 1
        hidden = padded(config.hidden_size, math.lcm(vectors.block, group))
        columns = COLUMNS if layers.uses_amx else 1
        inner = padded(config.intermediate_size, math.lcm(vectors.lanes, group, columns))
        return cls(config, options, vectors, layers, hidden, inner, {})

    def layers_of(self, kind: KernelKind) -> Format:
        """How a kernel multiplies the matrices of layers. In decode there are too few rows for
        weights that become floats to pay off."""
        if self.layers.dtype == "bf16" and self.vectors.has_slow_dot and not kind.is_decode:
            return replace(self.layers, activation_dtype="f32")
        given = self.options.activation_dtype or "int16"
        is_float = given == "bf16"
        return replace(
            self.layers, activation_dtype="int16" if is_float and kind.is_decode else given
        )

    @property
    def heads_width(self) -> int:
        """Features of all query heads."""
        return self.config.num_heads * self.config.head_dim

    @property
    def qkv_width(self) -> int:
        """Features of all queries, keys and values."""
        return (self.config.num_heads + 2 * self.config.num_kv_heads) * self.config.head_dim

    @property
    def num_summaries(self) -> int:
        """Summary blocks of a row's logits."""
        return -(-self.config.vocab_size // LOGITS_BLOCK)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Sizes [out, in] by name; those of layers as in layer 0."""
        table = self._tensors
        return matrix_sizes([table.embedding, *table.layers[0], *table.head])

    @property
    def embedding_format(self) -> Format:
        """That of the embedding, which may be the head too."""
        return self._format(self._tensors.embedding)

    @property
    def head_format(self) -> Format:
        """That of the matrix that computes logits."""
        table = self._tensors
        return self._format([table.embedding, *table.head][-1])

    def layer_parts(self, kind: KernelKind) -> dict[str, list[list[Part]]]:
        """Of each matrix of the layers, by name in layer 0: its parts in every layer."""
        like = self.layers_of(kind)
        return {
            tensors[0].name.removesuffix(".weight"): [self._parts(t, like) for t in tensors]
            for tensors in zip(*self._tensors.layers, strict=True) if tensors[0].is_matrix
        }  # fmt: skip

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the archive."""
        table = self._tensors
        layers = [part for layer in table.layers
                  for tensor in sorted(layer, key=lambda t: t.is_matrix)
                  for part in self._stored(tensor)]  # fmt: skip
        tensors = [table.rope, table.embedding, *table.head, table.norm, *layers]
        return [self._parameter(tensor) for tensor in tensors]

    @cached_property
    def _tensors(self) -> DecoderTensors:
        return decoder_tensors(
            self.config, context=self.options.max_seq_len, hidden=self.hidden,
            intermediate=self.inner,
        )  # fmt: skip

    @cached_property
    def _split(self) -> set[str]:
        """Matrices of layers that are stored in parts, as their types differ in some layer."""
        columns = zip(*self._tensors.layers, strict=True)  # a tensor in all layers
        are_mixed = [any(len(self._dtypes(t)) > 1 for t in tensors) for tensors in columns]
        return {t.name for layer in self._tensors.layers
                for t, is_mixed in zip(layer, are_mixed, strict=True) if is_mixed}  # fmt: skip

    def _stored(self, tensor: ModelTensor) -> list[ModelTensor]:
        return tensor.parts() if tensor.name in self._split else [tensor]

    def _parts(self, tensor: ModelTensor, like: Format) -> list[Part]:
        stored = self._stored(tensor)
        blocks = [tensor.shape[0] // self.vectors.block for tensor in stored]
        firsts = accumulate(blocks[:-1], initial=0)
        return [
            Part(t.name, replace(like, dtype=self._format(t).dtype), first)
            for t, first in zip(stored, firsts, strict=True)
        ]

    def _dtypes(self, tensor: ModelTensor) -> set[str]:
        return {self.options.dtype_of(source) for source in tensor.sources}

    def _format(self, tensor: ModelTensor) -> Format:
        [dtype] = self._dtypes(tensor)
        return replace(self.layers, dtype=dtype)

    def _parameter(self, tensor: ModelTensor) -> Parameter:
        if tensor.is_matrix:
            return self._format(tensor).parameter(tensor.name, *tensor.shape)
        return Parameter(tensor.name, tensor.shape, "f32")
