"""The limits of a step that a model sets."""

from __future__ import annotations

from sf_local.artifact.open import Artifact
from sf_local.engine.scheduler import ALONE_TOKENS, MAX_RUNNING, PREFILL_TOKENS, Limits

# Logits of prompts' tokens that one call returns. Log probabilities are computed from them while
# all requests wait: about 20 ms, with the 1,000 likeliest of each.
MAX_LOGITS = 1 << 22
# Bytes of weights of models with which ALONE_TOKENS take no more than a second or two on a CPU;
# whoever comes meanwhile waits for that
SMALL = 1 << 30


def limits_of(
    artifact: Artifact, prefill_tokens: int | None = None, max_running: int = MAX_RUNNING
) -> Limits:
    """The limits of a model. Our own compiled code can begin a prefill at any token, amdsharktank's
    at whole pages or only at the beginning of a prompt; `prefill_tokens` is rounded up to that.
    """
    config, manifest, is_default = artifact.config, artifact.manifest, prefill_tokens is None
    prefill_tokens = prefill_tokens or PREFILL_TOKENS
    sizes = config.prefill_batch_sizes, config.decode_batch_sizes
    if not config.has_prefill_position:
        return Limits(*sizes, artifact.max_tokens, max_running, "nothing")
    if manifest:
        num_pages = -(-(MAX_LOGITS // manifest.vocab_size) // config.page_size)
        logits_tokens = max(1, num_pages) * config.page_size
        is_small = manifest.device == "cpu" and artifact.num_weight_bytes <= SMALL
        return Limits(
            *sizes, prefill_tokens, max_running, logits_tokens=logits_tokens,
            alone_tokens=ALONE_TOKENS if is_default and is_small else 0,
        )  # fmt: skip
    num_pages = -(-min(prefill_tokens, artifact.max_tokens) // config.page_size)
    return Limits(*sizes, num_pages * config.page_size, max_running, "pages")
