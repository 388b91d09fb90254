"""LlamaConfig: the shape of one Llama, whatever format its weights came in."""

from dataclasses import dataclass


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
