"""The hyperparameters of a Llama and of a vision tower, whatever files their weights are in."""

from dataclasses import dataclass
from typing import Protocol


class Heads(Protocol):
    """What attention needs to know of a model."""

    @property
    def num_layers(self) -> int:
        """Layers whose keys and values a page of the cache holds."""

    @property
    def num_heads(self) -> int:
        """Heads of queries."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""

    @property
    def head_dim(self) -> int:
        """Features of a head."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled, for contexts beyond the trained one.

    `kind` "linear" divides every frequency by `factor`; "llama3" keeps the high frequencies,
    divides the low ones, and blends between (Llama 3.1, as in transformers); "factors" divides
    frequency i by `factors[i]`, `head_dim // 2` of them (how GGUF stores "llama3").
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters of a Llama.

    Weights are `[out, in]`; `num_heads` is a multiple of `num_kv_heads`; `max_seq_len` is the
    context the model was trained for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    max_seq_len: int
    tied_embeddings: bool
    rope_scaling: RopeScaling | None = None


@dataclass(frozen=True)
class VisionConfig:
    """Hyperparameters of a vision tower and of its connector to a Llama.

    `family`: "idefics3" or "llava". `num_layers`: layers that are computed. `activation`:
    "gelu_tanh" or "quick_gelu". `scale_factor`: the side of the square of patches that become one
    token. Sizes of images and patches are sides, in pixels; what is right of and below the last
    whole patches is not seen.
    """

    family: str
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: str
    scale_factor: int

    @property
    def has_class_token(self) -> bool:
        """Whether a token that is no patch stands before the patches, as in CLIP."""
        return self.family == "llava"

    @property
    def patches_across(self) -> int:
        """Patches in a row of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return self.patches_across**2

    @property
    def num_positions(self) -> int:
        """Positions of a tile in the tower: patches, and the class token."""
        return self.num_patches + self.has_class_token

    @property
    def patch_elements(self) -> int:
        """Numbers of a patch, in three channels."""
        return 3 * self.patch_size**2

    @property
    def tokens_per_tile(self) -> int:
        """Embeddings that a tile becomes."""
        return self.num_patches // self.scale_factor**2

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_heads
