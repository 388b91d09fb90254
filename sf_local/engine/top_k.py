"""Models compiled with `top_k`, as amdsharktank can: they give the k likeliest tokens, not all.

What needs the other tokens' logits is refused; what does not sees them as impossible.
"""

from __future__ import annotations

from sf_local.errors import RequestError
from sf_local.request.checks import shown
from sf_local.request.params import SamplingParams

# Could choose a token that is not among the k likeliest, or ask for the probability of one.
NEED_ALL = (
    "regex", "json_schema", "ebnf", "return_logprob", "min_new_tokens", "logit_bias",
    "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
NEUTRAL = SamplingParams()


def check_params(params: SamplingParams, k: int) -> None:
    """Raise RequestError for what cannot be had from the k likeliest tokens."""
    for name in NEED_ALL:
        value = getattr(params, name)
        if value != getattr(NEUTRAL, name):
            raise refusal(name, value, k)
    if not (params.is_greedy or 1 <= params.top_k <= k):
        allowed = "top_k=1" if k == 1 else f"top_k from 1 to {k}"
        raise RequestError(
            f"top_k={params.top_k}: the model was compiled with top_k={k} and gives only so many "
            f"tokens to draw from; use temperature=0, or {allowed}"
        )


def refusal(name: str, value: object, k: int) -> RequestError:
    return RequestError(
        f"{name}={shown(value)} needs the logits of all tokens, but the model was compiled with "
        f"top_k={k} and gives only the likeliest; leave it out, or export the model without top_k"
    )
