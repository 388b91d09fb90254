"""The model families that can be compiled.

A family is a module beside this one. To add one, write models/<family>.py with the functions of the
protocols below, and give it a line in HUGGING_FACE, in GGUF, or in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from tokenizers import Tokenizer

from compile.models import llama, vision_families
from compile.models.spec import LlamaConfig, VisionConfig
from compile.models.tensors import Shape
from compile.reading import check_supported, unsupported


class Family(Protocol):
    """What both kinds of files need to know."""

    def is_weight(self, name: str, config: LlamaConfig, vision: VisionConfig | None) -> bool:
        """Whether a tensor of this canonical name is computed with; others are left out."""


class HuggingFaceFamily(Family, Protocol):
    """A family whose Hugging Face folders can be read."""

    def hf_config(self, path: Path, raw: dict[str, Any]) -> tuple[LlamaConfig, VisionConfig | None]:
        """The model in the config.json at `path`, whose contents are `raw`.

        Raises SourceError, and UnsupportedError for whatever would be computed wrongly.
        """

    def canonical_name(self, name: str) -> str:
        """The name in `models.tensors` of a tensor that a folder calls `name`; else `name`."""

    def image_settings(
        self,
        folder: Path,
        raw: Mapping[str, Any],
        vision: VisionConfig | None,
        tokenizer: Tokenizer,
    ) -> dict[str, Any] | None:
        """The fields of sf_local's ImageSettings, or None for a model that takes no images.

        Raises as hf_config does.
        """


class GGUFFamily(Family, Protocol):
    """A family whose GGUF files can be read; their tensors have canonical names."""

    def gguf_config(
        self, path: Path, fields: Mapping[str, Any], shapes: Mapping[str, Shape],
        read: Callable[[str], NDArray[Any]],
    ) -> LlamaConfig:  # fmt: skip
        """The model of a file with these metadata and tensors; `read` gives a tensor's numbers.

        Raises SourceError, and UnsupportedError for whatever would be computed wrongly.
        """

    def gguf_row_order(
        self, name: str, config: LlamaConfig
    ) -> Callable[[int], NDArray[Any]] | None:
        """How the rows of a tensor are permuted: None, or the function that takes their number and
        gives the stored row of each of our rows."""


HUGGING_FACE: dict[str, HuggingFaceFamily] = {  # by config.json's model_type
    "llama": llama,
    "idefics3": vision_families,
    "smolvlm": vision_families,
    "llava": vision_families,
}

GGUF: dict[str, GGUFFamily] = {  # by the metadata's general.architecture
    "llama": llama,
}


def find_hf_family(path: Path, raw: Mapping[str, Any]) -> HuggingFaceFamily:
    """The family of a config.json; raises UnsupportedError."""
    check_supported(path, raw, {"model_type": ([*HUGGING_FACE], _names(HUGGING_FACE))})
    return HUGGING_FACE[raw["model_type"]]


def find_gguf_family(path: Path, fields: Mapping[str, Any]) -> GGUFFamily:
    """The family of a GGUF file's metadata; raises UnsupportedError."""
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF:
        raise unsupported(path, f"general.architecture {architecture!r}", _names(GGUF))
    return GGUF[architecture]


def _names(families: Mapping[str, object]) -> str:
    return ", ".join(map(repr, families))
