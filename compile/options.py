"""The options of a build, and what an emitter is told of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from compile.formats.layout import DTYPES, QUANTIZED
from compile.target import Target, Tuning, resolve_target
from sf_local.errors import UnsupportedError


@dataclass(frozen=True)
class ModelOptions:
    """BuildOptions for one model and target, with no default left open."""

    weight_dtype: str  # of most: "f32", "f16", "bf16", or one of `compile.formats.blocks`
    kv_dtype: str  # "f32", "f16" or "bf16"
    page_size: int  # tokens a KV page
    prefill_batch_sizes: tuple[int, ...]
    decode_batch_sizes: tuple[int, ...]
    max_seq_len: int  # tokens
    image_batch_sizes: tuple[int, ...] = ()  # tiles of images; none without a vision tower
    activation_dtype: str | None = None  # one of ACTIVATIONS where weights are quantized
    # Types of weights that are not as most, by canonical name; they and most are quantized
    tensor_dtypes: Mapping[str, str] = field(default_factory=dict)

    def dtype_of(self, name: str) -> str:
        """What a matrix of the source becomes, by its canonical name."""
        return self.tensor_dtypes.get(name, self.weight_dtype)

    @property
    def calls(self) -> list[tuple[str, int]]:
        """Functions of the language model, with a batch size each.

        Each comes twice: one returns all logits, one ("_next") those after each row's last token
        and their summary.
        """
        prefills = ["prefill", "prefill_embeds"] if self.image_batch_sizes else ["prefill"]
        kinds = [(name, self.prefill_batch_sizes) for name in prefills]
        kinds.append(("decode", self.decode_batch_sizes))
        return [
            (f"{name}{kind}", size) for name, sizes in kinds for size in sizes
            for kind in ("", "_next")
        ]  # fmt: skip

    @property
    def function_names(self) -> list[str]:
        """All functions of the module, as it exports them."""
        images = [("encode_image", size) for size in self.image_batch_sizes]
        return [f"{name}_bs{size}" for name, size in [*self.calls, *images]]


ACTIVATIONS = ("int8", "int16", "bf16")
MAX_BATCH_SIZE = 256  # rows of a call
PAGE_SIZES = (8, 16, 32, 64, 128, 256)  # tokens


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What to build; raises UnsupportedError for values that cannot be built.

    None means the default of the target, or of the source.
    target: "cpu", an AMD chip such as "gfx942", or several as "gfx942,gfx1100,cpu".
    cpu: "host", "generic", "x86-64-v3" or "x86-64-v4", the last two also with features that are
    more, e.g. "x86-64-v3+avx_vnni" and "x86-64-v4+avx512_vnni".
    weight_dtype: "f32", "f16", "bf16", "int8" or "int4". By default as the source: 16 bits for
    floats; blocks of types Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K are carried over, and
    other quantized types become int8; on CPUs, where heads are no whole 32s, 16 bits.
    activation_dtype: what quantized weights are multiplied with: "int16", which is exact enough for
    prefill and decode to agree to the bit; "bf16", for CPUs with AMX and there the default, by
    which prefill is two to three times as fast; or "int8", less accurate, and faster on CPUs with
    VNNI but without AMX.
    kv_dtype: a float type; by default that of the weights, or of unquantized ones.
    page_size: tokens a KV page.
    prefill_batch_sizes, decode_batch_sizes: rows of the calls that are compiled, ascending.
    image_batch_sizes: tiles of images that are encoded together, ascending; by default (1, 4), and
    on CPUs (1,), so that other requests decode between two tiles.
    max_seq_len: the context in tokens; by default the model's own.
    row_major: on a CPU too, the code that GPUs get, with matrices row by row (to test it there).
    tuning: of a CPU's kernels; see `compile.tools.tune_cpu`.
    """

    target: str = "cpu"
    cpu: str = "host"
    weight_dtype: str | None = None
    activation_dtype: str | None = None
    kv_dtype: str | None = None
    page_size: int = 16
    prefill_batch_sizes: tuple[int, ...] = (1, 4)
    decode_batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    image_batch_sizes: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    row_major: bool = False
    tuning: Tuning | None = None

    @property
    def targets(self) -> list[Target]:
        """The targets, with the features and the tuning of the CPU; raises UnsupportedError."""
        names = self.target.split(",")
        if len(set(names)) < len(names):
            raise UnsupportedError(f"target={self.target!r} names one twice")
        found = [resolve_target(name, self.cpu) for name in names]
        return [dataclasses.replace(target, tuning=self.tuning) for target in found]

    def __post_init__(self) -> None:
        for name in ("target", "cpu"):
            if not isinstance(value := getattr(self, name), str):
                raise UnsupportedError(f"{name}={value!r} must be a str")
        for name, allowed in (
            ("weight_dtype", (*DTYPES, *QUANTIZED)),
            ("activation_dtype", ACTIVATIONS),
            ("kv_dtype", DTYPES),
        ):
            if (value := getattr(self, name)) not in (None, *allowed):
                raise UnsupportedError(f"{name}={value!r}; use one of {', '.join(allowed)}")
        if self.page_size not in PAGE_SIZES:
            raise UnsupportedError(f"page_size={self.page_size!r}; use one of {PAGE_SIZES}")
        for name in ("prefill_batch_sizes", "decode_batch_sizes", "image_batch_sizes"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if not isinstance(sizes, tuple) or not sizes or not _are_ascending(sizes):
                raise UnsupportedError(
                    f"{name}={sizes!r}; give different sizes from 1 to {MAX_BATCH_SIZE}, ascending"
                )
        context = self.max_seq_len
        if context is not None and (not isinstance(context, int) or isinstance(context, bool)):
            raise UnsupportedError(f"max_seq_len={context!r} must be a number of tokens, or None")


def _are_ascending(sizes: tuple[int, ...]) -> bool:
    """Whether these are sizes of batches, each larger than the one before."""
    are_sizes = all(type(size) is int and 1 <= size <= MAX_BATCH_SIZE for size in sizes)
    return are_sizes and all(size < larger for size, larger in pairwise(sizes))
