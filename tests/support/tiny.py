"""The tiny random models that tests compile, and where golden data and peers lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile import BuildOptions, build
from compile.models.spec import LlamaConfig, VisionConfig
from compile.sources.open import open_source
from tests.support.quantized import Kind, k_m, of_random_blocks
from tests.support.reference import random_weights, write_hf_folder
from tests.support.vision_reference import (
    IDEFICS3,
    LLAVA,
    forward_images,
    random_model,
    write_vision_folder,
)

DATA = Path(__file__).parents[1] / "data"
PEERS = os.environ.get("SF_LOCAL_PEERS", "")
CI = bool(os.environ.get("CI"))

TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=72,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=256,
    tied_embeddings=True,
)
TINY_OPTIONS = BuildOptions(
    weight_dtype="f32",
    kv_dtype="f32",
    page_size=8,
    prefill_batch_sizes=(1, 3),
    decode_batch_sizes=(1, 4),
    image_batch_sizes=(1, 3),
)
# Each size of a batch costs about a second of compiling, so where the number is not the point:
ONE_SIZE = {"prefill_batch_sizes": (1,), "decode_batch_sizes": (1,)}
ONE_PADDED = {"prefill_batch_sizes": (3,), "decode_batch_sizes": (4,)}  # of rows, mostly padding
GPU_SIZES = {"prefill_batch_sizes": (1,), "decode_batch_sizes": (1, 8)}  # of models for chips
QUANTIZABLE = {"head_dim": 32, "num_heads": 3, "num_kv_heads": 1, "hidden_size": 80}
SUPER_BLOCKS = {"hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "head_dim": 64}
MACHINE_CODE_CHIPS = ("gfx942", "gfx1100")  # of the default tests
CODE_CHIPS = (*MACHINE_CODE_CHIPS, *(pytest.param(chip, marks=pytest.mark.slow)
                                     for chip in ("gfx90a", "gfx1201")))  # fmt: skip
CODE_OPTIONS = replace(TINY_OPTIONS, weight_dtype="f16", kv_dtype="f16", **GPU_SIZES)
SEEING_OPTIONS = replace(TINY_OPTIONS, **ONE_PADDED)


@dataclass(frozen=True)
class TinyModel:
    """A compiled random Llama with the weights it was made from."""

    config: LlamaConfig
    weights: dict[str, np.ndarray]
    source: Path
    artifact: Path


class TinyModels:
    """Builds tiny models, each set of arguments once a run: make_tiny(row_major=True, num_heads=4).

    Fields of LlamaConfig and of BuildOptions, over TINY and TINY_OPTIONS; keep_mlir;
    has_code=False, which compiles nothing, for tests that want its weights; and kind="Q4_K", by
    which its matrices are random blocks as in a Q4_K_M file, with weight_dtype=None, SUPER_BLOCKS.
    """

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self._made: dict[str, TinyModel] = {}

    def __call__(
        self, *, keep_mlir: bool = False, has_code: bool = True, **changes: Any
    ) -> TinyModel:
        key = repr((keep_mlir, has_code, sorted(changes.items())))
        if key not in self._made:
            with nullcontext() if has_code else _no_code():
                self._made[key] = self._make(keep_mlir, changes)
        return self._made[key]

    def _make(self, keep_mlir: bool, changes: dict[str, Any]) -> TinyModel:
        shape = {k: v for k, v in changes.items() if k in LlamaConfig.__dataclass_fields__}
        rest = {k: v for k, v in changes.items() if k not in {*shape, "kind"}}
        config, folder = replace(TINY, **shape), self._new_folder()
        weights = random_weights(config, seed=7)
        write_hf_folder(folder / "source", config, weights)
        source = open_source(folder / "source")
        if "kind" in changes:
            source = of_random_blocks(source, k_m(Kind[changes["kind"]]))
            weights = {name: tensor.read(slice(None)) for name, tensor in source.tensors.items()}
        options = replace(TINY_OPTIONS, **rest)
        artifact = build(source, folder / "artifact", options, keep_mlir=keep_mlir)
        return TinyModel(config, weights, folder / "source", artifact)


@contextmanager
def _no_code() -> Iterator[None]:
    """Builds write an empty VMFB."""
    with pytest.MonkeyPatch.context() as patch:
        module = import_module("compile.build")  # the package's `build` is the function
        patch.setattr(module, "iree_compile", lambda mlir, vmfb, *rest: vmfb.touch())
        yield


@dataclass(frozen=True)
class SeeingModel:
    """A compiled random Llama with a vision tower, and the weights of both."""

    vision: VisionConfig
    weights: dict[str, np.ndarray]
    source: Path
    artifact: Path

    def logits(self, tokens: Sequence[int], pixels: np.ndarray) -> np.ndarray:
        """[S, V] of tokens with tiles [N, 3, size, size]."""
        return forward_images(TINY, self.vision, self.weights, tokens, pixels)


class SeeingModels:
    """Builds tiny models that see, once a run: make_seeing("llava", row_major=True).

    Fields of VisionConfig and of BuildOptions, over SEEING_OPTIONS, as in `TinyModels`.
    """

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self._made: dict[str, SeeingModel] = {}

    def __call__(self, family: str, *, keep_mlir: bool = False, **changes: Any) -> SeeingModel:
        key = repr((family, keep_mlir, sorted(changes.items())))
        if key not in self._made:
            self._made[key] = self._make(family, keep_mlir, changes)
        return self._made[key]

    def _make(self, family: str, keep_mlir: bool, changes: dict[str, Any]) -> SeeingModel:
        shape = {k: v for k, v in changes.items() if k in VisionConfig.__dataclass_fields__}
        rest = {k: v for k, v in changes.items() if k not in shape}
        vision = replace({"idefics3": IDEFICS3, "llava": LLAVA}[family], **shape)
        folder, weights = self._new_folder(), random_model(TINY, vision, seed=7)
        write_vision_folder(folder / "source", TINY, vision, weights)
        options = replace(SEEING_OPTIONS, **rest)
        artifact = build(folder / "source", folder / "artifact", options, keep_mlir=keep_mlir)
        return SeeingModel(vision, weights, folder / "source", artifact)


def peer(name: str) -> Path:
    """The Python of one of install_peers.sh's environments; the test skips where it is missing."""
    python = Path(PEERS) / name / "bin" / "python"
    if not PEERS or not python.exists():
        pytest.skip(f"no environment {name!r} in SF_LOCAL_PEERS={PEERS!r}; see install_peers.sh")
    return python
