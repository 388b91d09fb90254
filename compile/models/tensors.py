"""The tensors of a model: one table for the decoder, one for the vision tower.

An `Entry` is a tensor that compiled code reads. It is made of one tensor of the weights' files, or
of several whose rows stand together, so that one product computes them all: queries, keys and
values, or gate and up. Sizes have names here; `decoder_tensors` and `vision_tensors` put in the
numbers of a config, or larger ones where a target pads features with zeros.

In the names "{}" is the number of the layer. Canonical names are those of GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

from compile.models.spec import LlamaConfig, VisionConfig

Shape = tuple[int, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """A tensor of the weights' files, which gives an entry `rows` rows (a size).

    Names are without the suffix; hf_name is Hugging Face's, without what stands before it in the
    tensors of a layer or of a tower.
    """

    name: str
    hf_name: str
    rows: str


@dataclass(frozen=True)
class Entry:
    """A tensor as compiled code reads it: the rows of its parts, one part after the other."""

    name: str
    parts: tuple[Part, ...]
    columns: str | None = None  # a size; None of a vector
    suffix: str = ".weight"
    is_matrix: bool = True
    is_interleaved: bool = False


@dataclass(frozen=True)
class ModelTensor:
    """An entry of one layer, with numbers.

    shape: [rows, columns] of a matrix, [n] of a vector. sources: the shapes of its parts, by
    canonical name. is_matrix: products read it, in the weights' dtype; all else is float32.
    is_interleaved: where a matrix is stored in blocks of rows, each block has rows of every part.
    """

    name: str
    shape: Shape
    sources: Mapping[str, Shape] = field(default_factory=dict)
    is_matrix: bool = False
    is_interleaved: bool = False

    def parts(self) -> list[ModelTensor]:
        """One tensor for each of its sources, as which it can be stored instead."""
        return self.runs(lambda name: name)

    def runs(self, key: Callable[[str], str]) -> list[ModelTensor]:
        """One tensor for all sources side by side whose names have the same key."""
        found = [[*names] for _, names in groupby(self.sources, key)]
        return [self] if len(found) == 1 else [self._run(names) for names in found]

    def all_runs(self) -> list[ModelTensor]:
        """Every tensor that `runs` may make of it."""
        names, ends = [*self.sources], range(1, len(self.sources) + 1)
        return [*(self._run(names[i:end]) for end in ends for i in range(end)), self]

    def _run(self, names: Sequence[str]) -> ModelTensor:
        sources = {name: self.sources[name] for name in names}
        rows = sum(shape[0] for shape in sources.values())
        return ModelTensor("+".join(names), (rows, *self.shape[1:]), sources, self.is_matrix)


def _matrix(name: str, hf_name: str, rows: str, columns: str) -> Entry:
    return Entry(name, (Part(name, hf_name, rows),), columns)


def _vector(name: str, hf_name: str, size: str, suffix: str = ".weight") -> Entry:
    return Entry(name, (Part(name, hf_name, size),), None, suffix, is_matrix=False)


def _biased(name: str, columns: str, *parts: Part) -> tuple[Entry, Entry]:
    return Entry(name, parts, columns), Entry(name, parts, None, ".bias", is_matrix=False)


def _layer_norm(name: str, hf_name: str) -> tuple[Entry, Entry]:
    return _vector(name, hf_name, "hidden"), _vector(name, hf_name, "hidden", ".bias")


# The decoder

EMBEDDING = _matrix("token_embd", "model.embed_tokens", "vocab", "hidden")
OUTPUT_NORM = _vector("output_norm", "model.norm", "hidden")
OUTPUT = _matrix("output", "lm_head", "vocab", "hidden")
DECODER_LAYER = (
    _vector("blk.{}.attn_norm", "input_layernorm", "hidden"),
    Entry(
        "blk.{}.attn_qkv",
        (
            Part("blk.{}.attn_q", "self_attn.q_proj", "heads"),
            Part("blk.{}.attn_k", "self_attn.k_proj", "kv_heads"),
            Part("blk.{}.attn_v", "self_attn.v_proj", "kv_heads"),
        ),
        "hidden",
    ),
    _matrix("blk.{}.attn_output", "self_attn.o_proj", "hidden", "heads"),
    _vector("blk.{}.ffn_norm", "post_attention_layernorm", "hidden"),
    Entry(
        "blk.{}.ffn_gate_up",
        (
            Part("blk.{}.ffn_gate", "mlp.gate_proj", "intermediate"),
            Part("blk.{}.ffn_up", "mlp.up_proj", "intermediate"),
        ),
        "hidden",
        is_interleaved=True,
    ),
    _matrix("blk.{}.ffn_down", "mlp.down_proj", "hidden", "intermediate"),
)

# The vision tower, and what makes its output embeddings of the text model

PATCHES = _biased(
    "v.patch_embd", "patch", Part("v.patch_embd", "embeddings.patch_embedding", "hidden")
)
POSITIONS = Entry(
    "v.position_embd",
    (Part("v.position_embd", "embeddings.position_embedding", "positions"),),
    "hidden",
    is_matrix=False,
)
CLASS_TOKEN = _vector("v.class_embd", "embeddings.class_embedding", "hidden", suffix="")
PRE_NORM = _layer_norm("v.pre_ln", "pre_layrnorm")
VISION_LAYER = (
    *_layer_norm("v.blk.{}.ln1", "layer_norm1"),
    *_layer_norm("v.blk.{}.ln2", "layer_norm2"),
    *_biased(
        "v.blk.{}.attn_qkv",
        "hidden",
        Part("v.blk.{}.attn_q", "self_attn.q_proj", "heads"),
        Part("v.blk.{}.attn_k", "self_attn.k_proj", "heads"),
        Part("v.blk.{}.attn_v", "self_attn.v_proj", "heads"),
    ),
    *_biased(
        "v.blk.{}.attn_out", "heads", Part("v.blk.{}.attn_out", "self_attn.out_proj", "hidden")
    ),
    *_biased("v.blk.{}.ffn_up", "hidden", Part("v.blk.{}.ffn_up", "mlp.fc1", "intermediate")),
    *_biased("v.blk.{}.ffn_down", "intermediate", Part("v.blk.{}.ffn_down", "mlp.fc2", "hidden")),
)
IDEFICS3_CONNECTOR = (
    *_layer_norm("v.post_ln", "post_layernorm"),
    _matrix("mm.fc", "connector.modality_projection.proj", "text_hidden", "shuffled"),
)
LLAVA_CONNECTOR = (
    *_biased("mm.1", "hidden", Part("mm.1", "multi_modal_projector.linear_1", "text_hidden")),
    *_biased("mm.2", "projected", Part("mm.2", "multi_modal_projector.linear_2", "text_hidden")),
)

# All entries, whatever the family

DECODER = (EMBEDDING, *DECODER_LAYER, OUTPUT_NORM, OUTPUT)
VISION = (*PATCHES, POSITIONS, CLASS_TOKEN, *PRE_NORM, *VISION_LAYER, *IDEFICS3_CONNECTOR,
          *LLAVA_CONNECTOR)  # fmt: skip


@dataclass(frozen=True)
class DecoderTensors:
    """The tensors of a decoder, those of each layer in the order of their use."""

    rope: ModelTensor  # computed, see `models.rope`
    embedding: ModelTensor
    layers: Sequence[Sequence[ModelTensor]]
    norm: ModelTensor
    head: Sequence[ModelTensor]  # none if it is the embedding

    @property
    def all(self) -> list[ModelTensor]:
        """In the order of their use."""
        return [self.embedding, self.rope, *chain(*self.layers), self.norm, *self.head]


@dataclass(frozen=True)
class VisionTensors:
    """The tensors of a tower and its connector.

    embeddings: those of positions, and of CLIP the class token and the norm that follows.
    """

    patches: Sequence[ModelTensor]
    embeddings: Sequence[ModelTensor]
    layers: Sequence[Sequence[ModelTensor]]
    connector: Sequence[ModelTensor]

    @property
    def all(self) -> list[ModelTensor]:
        """In the order of their use."""
        first, *bias = self.patches
        return [first, *self.embeddings, *bias, *chain(*self.layers), *self.connector]


def decoder_tensors(config: LlamaConfig, **changed: int) -> DecoderTensors:
    """The decoder's tensors.

    changed: sizes that are not the config's, such as `hidden` with padding, or a shorter `context`.
    """
    sizes = {
        "vocab": config.vocab_size, "context": config.max_seq_len, "hidden": config.hidden_size,
        "intermediate": config.intermediate_size, "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim, **changed,
    }  # fmt: skip
    return DecoderTensors(
        ModelTensor("rope", (sizes["context"], 2, config.head_dim // 2)),
        _tensor(EMBEDDING, sizes),
        _layers(DECODER_LAYER, sizes, config.num_layers),
        _tensor(OUTPUT_NORM, sizes),
        [] if config.tied_embeddings else [_tensor(OUTPUT, sizes)],
    )


def vision_tensors(config: VisionConfig, text_hidden: int, **changed: int) -> VisionTensors:
    """The tensors of a tower and its connector to a text model of `text_hidden` features.

    changed: sizes that are not the config's, such as `hidden` with padding.
    """
    sizes = {
        "hidden": config.hidden_size, "intermediate": config.intermediate_size,
        "heads": config.num_heads * config.head_dim, "patch": config.patch_elements,
        "positions": config.num_positions, "text_hidden": text_hidden, "projected": text_hidden,
        "shuffled": config.hidden_size * config.scale_factor**2, **changed,
    }  # fmt: skip
    patches: Sequence[Entry] = PATCHES
    embeddings: Sequence[Entry] = (POSITIONS,)
    connector: Sequence[Entry] = IDEFICS3_CONNECTOR
    if config.family == "llava":
        patches, connector = PATCHES[:1], LLAVA_CONNECTOR
        embeddings = (POSITIONS, CLASS_TOKEN, *PRE_NORM)
    return VisionTensors(
        [_tensor(entry, sizes) for entry in patches],
        [_tensor(entry, sizes) for entry in embeddings],
        _layers(VISION_LAYER, sizes, config.num_layers),
        [_tensor(entry, sizes) for entry in connector],
    )


def model_tensors(config: LlamaConfig, vision: VisionConfig | None) -> list[ModelTensor]:
    """All tensors of a model, unpadded."""
    tensors = decoder_tensors(config).all
    return tensors + (vision_tensors(vision, config.hidden_size).all if vision else [])


def source_shapes(tensors: Iterable[ModelTensor]) -> dict[str, Shape]:
    """Shapes of the tensors that sources must have, by canonical name."""
    return {name: shape for tensor in tensors for name, shape in tensor.sources.items()}


def matrix_sizes(tensors: Iterable[ModelTensor]) -> dict[str, tuple[int, int]]:
    """Sizes [rows, columns] of the matrices among tensors, by name without suffix."""
    return {
        tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for tensor in tensors if tensor.is_matrix
    }  # fmt: skip


def hf_names(entries: Iterable[Entry]) -> dict[str, str]:
    """Canonical names by Hugging Face's, both without suffix."""
    return {part.hf_name: part.name for entry in entries for part in entry.parts}


def has_bias(name: str) -> bool:
    """Whether the table has a bias of this canonical name, in whatever layer."""
    return re.sub(r"\bblk\.\d+\.", "blk.{}.", name) in _BIASES


_BIASES = {part.name + entry.suffix
           for entry in (*DECODER, *VISION) if entry.suffix == ".bias"
           for part in entry.parts}  # fmt: skip


def _layers(entries: Sequence[Entry], sizes: Sizes, count: int) -> list[list[ModelTensor]]:
    return [[_tensor(entry, sizes, i) for entry in entries] for i in range(count)]


def _tensor(entry: Entry, sizes: Sizes, layer: int = 0) -> ModelTensor:
    columns = () if entry.columns is None else (sizes[entry.columns],)
    sources = {
        (part.name + entry.suffix).format(layer): (sizes[part.rows], *columns)
        for part in entry.parts
    }
    rows = sum(shape[0] for shape in sources.values())
    name = (entry.name + entry.suffix).format(layer)
    return ModelTensor(name, (rows, *columns), sources, entry.is_matrix, entry.is_interleaved)
