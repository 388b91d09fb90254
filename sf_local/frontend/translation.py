"""SGLang's sampling parameters as ours, and our outputs as the meta info of SGLang's server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.lang.ir import REGEX_BOOL, REGEX_FLOAT, REGEX_INT, REGEX_STR, SglSamplingParams

from sf_local.errors import RequestError
from sf_local.request.checks import shown
from sf_local.request.output import Logprobs, Output, Top
from sf_local.request.params import GRAMMARS, ResolvedParams, SamplingParams
from sf_local.text.tokenizer import Tokenizer

_SAME_NAME = (
    "max_new_tokens", "min_new_tokens", "n", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "ignore_eos", "return_logprob",
    "logprob_start_len", "top_logprobs_num",
)  # fmt: skip
_OTHER_NAME = (
    "stop", "stop_token_ids", "dtype", "regex", "json_schema", "return_text_in_logprobs",
)  # fmt: skip
_NUMBER_STOPS = (" ", "\n")  # SGLang's regexes of numbers end with white space
_DTYPES: dict[object, tuple[str, Sequence[str]]] = {
    "int": (REGEX_INT, _NUMBER_STOPS),
    "float": (REGEX_FLOAT, _NUMBER_STOPS),
    "str": (REGEX_STR, ()),
    "bool": (REGEX_BOOL, ()),
}


def to_params(sampling: SglSamplingParams, defaults: SamplingParams) -> ResolvedParams:
    """The parameters of one `sgl.gen`; those that it does not give come from `defaults`. All are
    set, since a program means SGLang's values, whatever the model's makers recommend.

    Raises:
        RequestError: one is unknown, contradicts another, or is not allowed.
    """
    _check_known(sampling)
    values = {name: _given(sampling, name) for name in _SAME_NAME}
    values = {name: value for name, value in values.items() if value is not None}
    stop = _stops(sampling.stop)
    grammar = {"regex": sampling.regex, "json_schema": sampling.json_schema}
    if sampling.dtype is not None:
        for name, value in grammar.items():
            if value is not None:
                raise RequestError(
                    f"dtype and {name}: give one of them; a text follows one grammar"
                )
        grammar["regex"], extra = _dtype(sampling.dtype)
        stop = [*stop, *extra]
    if any(value is not None for value in grammar.values()):
        values |= dict.fromkeys(GRAMMARS) | grammar  # any of these replaces the default grammar
    with_text = _given(sampling, "return_text_in_logprobs", False)
    if not isinstance(with_text, bool):
        raise RequestError(f"return_text_in_logprobs={shown(with_text)} must be True or False")
    values["stop"] = _joined(defaults.stop or (), stop)
    values["stop_token_ids"] = _joined(defaults.stop_token_ids or (), sampling.stop_token_ids)
    return ResolvedParams(**(defaults.given() | values))


def meta_info(output: Output, tokenizer: Tokenizer, sampling: SglSamplingParams) -> dict[str, Any]:
    """An output in the form of SGLang's meta_info, with our `time_to_first_token` in seconds."""
    reason: dict[str, Any] = {"type": output.finish_reason}
    if output.matched is not None:
        reason["matched"] = output.matched
    elif output.finish_reason == "length":
        reason["length"] = output.completion_tokens
    info = {
        "finish_reason": reason,
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "cached_tokens": output.cached_tokens,
        "e2e_latency": output.latency,
        "time_to_first_token": output.time_to_first_token,
    }
    if output.logprobs is not None:
        with_text = bool(_given(sampling, "return_text_in_logprobs", False))
        info |= _logprob_info(output.logprobs, output.token_ids, tokenizer if with_text else None)
    return info


def entries(
    values: Sequence[float | None], ids: Sequence[int], tokenizer: Tokenizer | None
) -> list[tuple[float | None, int, str | None]]:
    """(log probability, token id, text) of each token; the text is None without `tokenizer`."""
    texts = [None if tokenizer is None else tokenizer.written_text(i) for i in ids]
    return list(zip(values, ids, texts, strict=True))


def _logprob_info(
    logprobs: Logprobs, output_ids: Sequence[int], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    def tops(values: Sequence[Top | None]) -> list[Any]:
        return [
            top and entries([value for value, _ in top], [i for _, i in top], tokenizer)
            for top in values
        ]

    info: dict[str, Any] = {
        "input_token_logprobs": entries(logprobs.prompt, logprobs.prompt_ids, tokenizer),
        "output_token_logprobs": entries(logprobs.output, output_ids, tokenizer),
    }
    if any(logprobs.output_top) or any(logprobs.prompt_top):
        info["input_top_logprobs"] = tops(logprobs.prompt_top)
        info["output_top_logprobs"] = tops(logprobs.output_top)
    return info


def _check_known(sampling: SglSamplingParams) -> None:
    """Refuse parameters of a newer SGLang that this module does not know."""
    for name, value in vars(sampling).items():
        is_known = name in _SAME_NAME or name in _OTHER_NAME
        if not is_known and value and value != getattr(SglSamplingParams(), name, None):
            raise RequestError(f"{name}={shown(value)} is not supported; remove it")


def _given(sampling: SglSamplingParams, name: str, default: Any = None) -> Any:
    """A parameter; SGLang's own defaults for some of them are the tuple (None,)."""
    value = getattr(sampling, name, None)
    return default if value is None or value == (None,) else value


def _joined(default: Sequence[Any], given: Any) -> Any:
    """Both lists; or `given` alone if it is no list, for SamplingParams to refuse it by name."""
    given = () if given is None else given
    return [*default, *given] if isinstance(given, (list, tuple)) else given


def _stops(stop: Any) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop or ()


def _dtype(dtype: object) -> tuple[str, Sequence[str]]:
    name = dtype.__name__ if isinstance(dtype, type) else dtype
    if not isinstance(name, str) or name not in _DTYPES:
        raise RequestError(
            f"dtype={shown(dtype)} must be int, float, str or bool, or one of these names"
        )
    return _DTYPES[name]
