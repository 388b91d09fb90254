"""What both emitters share: options, parameters, and the numbers that they agree on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from compile.formats.layout import DTYPES, QUANTIZED
from compile.target import Tuning
from sf_local.errors import UnsupportedError


@dataclass(frozen=True)
class ModelOptions:
    """What is compiled: dtypes ("f32" | "f16" | "bf16"), tokens a page, batch sizes, context."""

    weight_dtype: str
    kv_dtype: str
    page_size: int
    prefill_batch_sizes: tuple[int, ...]
    decode_batch_sizes: tuple[int, ...]
    max_seq_len: int
    image_batch_sizes: tuple[int, ...] = ()  # tiles of images; none without a vision tower

    @property
    def calls(self) -> list[tuple[str, int]]:
        """Functions of the language model and their batch sizes: with each of the ABI's, the one
        that sums logits up."""
        prefills = ["prefill", "prefill_embeds"] if self.image_batch_sizes else ["prefill"]
        kinds = [(name, self.prefill_batch_sizes) for name in prefills]
        kinds.append(("decode", self.decode_batch_sizes))
        return [
            (f"{name}{kind}", size) for name, sizes in kinds for size in sizes
            for kind in ("", "_next")
        ]  # fmt: skip

    @property
    def function_names(self) -> list[str]:
        images = [("encode_image", size) for size in self.image_batch_sizes]
        return [f"{name}_bs{size}" for name, size in [*self.calls, *images]]


MAX_BATCH_SIZE = 256


PAGE_SIZES = (8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What to build; raises UnsupportedError for values that cannot be built.

    None means the target's default; for max_seq_len, in tokens, the model's own context.
    target: "cpu", an AMD chip such as "gfx942", or several as "gfx942,gfx1100,cpu"; cpu: "host",
    "generic", "x86-64-v3" or "x86-64-v4". weight_dtype, kv_dtype: "f32", "f16" or "bf16".
    page_size: tokens a KV page. image_batch_sizes: tiles that are encoded together, of models that
    see: by default (1, 4), on CPUs one, between which others decode.
    row_major: matrices row by row, as GPUs have them, on a CPU too (to test that code there).
    tuning: of a CPU's kernels; see `compile.tools.tune_cpu`.
    """

    target: str = "cpu"
    cpu: str = "host"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    page_size: int = 16
    prefill_batch_sizes: tuple[int, ...] = (1, 4)
    decode_batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    image_batch_sizes: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    row_major: bool = False
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("weight_dtype", (*DTYPES, *QUANTIZED)), ("kv_dtype", DTYPES)):
            if (value := getattr(self, name)) not in (None, *allowed):
                raise UnsupportedError(f"{name}={value!r}; use one of {', '.join(allowed)}")
        if self.page_size not in PAGE_SIZES:
            raise UnsupportedError(f"page_size={self.page_size!r}; use one of {PAGE_SIZES}")
        for name in ("prefill_batch_sizes", "decode_batch_sizes", "image_batch_sizes"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            in_range = all(1 <= size <= MAX_BATCH_SIZE for size in sizes)
            if not sizes or list(sizes) != sorted(set(sizes)) or not in_range:
                raise UnsupportedError(
                    f"{name}={sizes!r}; give different sizes from 1 to {MAX_BATCH_SIZE}, ascending"
                )
