"""The shapes of a Llama and of a vision tower, whatever format their weights came in."""

from dataclasses import dataclass
from typing import Protocol


class Heads(Protocol):
    """What attention must know of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

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
    """Hyperparameters of a vision tower and of what makes its patches a Llama's embeddings.

    `family`: "idefics3" or "llava". `num_layers`: those that are computed. `activation`:
    "gelu_tanh" or "quick_gelu". `scale_factor`: the side of the square of patches that become one
    token. Sizes of images and patches are sides, in pixels; those right and below of whole patches
    are not seen.
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
        return self.family == "llava"

    @property
    def patches_across(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_across**2

    @property
    def num_positions(self) -> int:
        """Of the encoder: patches, and the class token."""
        return self.num_patches + self.has_class_token

    @property
    def patch_elements(self) -> int:
        return 3 * self.patch_size**2

    @property
    def tokens_per_tile(self) -> int:
        return self.num_patches // self.scale_factor**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
