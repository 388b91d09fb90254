"""What an artifact holds, in words."""

from __future__ import annotations

from sf_local.artifact.manifest import DTYPE_BYTES, ModelConfig
from sf_local.artifact.open import Artifact


def _abi(config: ModelConfig) -> str:
    parts = ["paged_llm_v1"]
    if config.has_prefill_position:
        parts.append("has_prefill_position")
    if config.top_k is not None:
        parts.append(f"top_k {config.top_k}")
    return ", ".join(parts)


def describe(artifact: Artifact) -> list[tuple[str, str]]:
    """What an artifact holds, as pairs of a name and a value to print."""
    config, manifest = artifact.config, artifact.manifest
    cache = config.paged_kv_cache
    token_bytes = config.page_bytes // config.page_size
    lines = [
        ("vmfb", f"{artifact.vmfb} ({artifact.vmfb.stat().st_size / 1e6:.1f} MB)"),
        ("weights", f"{artifact.num_weight_bytes / 1e6:.1f} MB"),
        ("ABI", _abi(config)),
        ("context", f"{config.max_seq_len} tokens"),
        ("layers", f"{config.transformer_block_count}, {cache.attention_head_count_kv} KV heads "
                   f"of {config.attn_head_dim}"),
        ("KV cache", f"{cache.kv_cache_dtype} ({DTYPE_BYTES[cache.kv_cache_dtype]} bytes), "
                     f"{config.page_size} tokens a page, {token_bytes / 1e3:.1f} kB a token"),
        ("prefill batches", ", ".join(map(str, config.prefill_batch_sizes))),
        ("decode batches", ", ".join(map(str, config.decode_batch_sizes))),
    ]  # fmt: skip
    if manifest is None:
        return [*lines, ("made by", "another exporter (no artifact.json)")]
    return [
        ("source", f"{manifest.source['name']} (sha256 {manifest.source['sha256'][:16]})"),
        ("target", f"{manifest.target} {' '.join(manifest.cpu_features)}".strip()),
        ("weight type", manifest.weight_dtype),
        ("multiplied with", manifest.activation_dtype or manifest.weight_dtype),
        ("compiler", f"iree-compile {manifest.compiler_version}"),
        *lines,
        ("vocabulary", str(manifest.vocab_size)),
        ("functions", ", ".join(manifest.functions)),
        (
            "sampling",
            ", ".join(f"{k} {v}" for k, v in manifest.sampling_defaults.items())
            or "none recommended: temperature 1, top_p 1",
        ),
    ]
