"""What the makers of a model recommend for sampling: generation_config.json, or keys of a GGUF."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from compile.reading import Where
from sf_local.artifact.sampling_defaults import RULES, check_sampling_default

log = logging.getLogger("sf_local.compile")
# llama.cpp's names, behind "general.sampling."
GGUF_NAMES = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip


def of_generation_config(path: Where, config: Mapping[str, Any]) -> dict[str, float]:
    """The parameters that a generation_config.json gives, by the names of SamplingParams.

    As vLLM takes them, and do_sample=false as temperature 0, as transformers does. What is not
    allowed is left out, and logged.
    """
    values = {name: config.get(name) for name in RULES}
    do_sample = config.get("do_sample")
    if do_sample is False:
        values["temperature"] = 0.0
    elif do_sample not in (None, True):
        log.warning("%s: do_sample=%r is neither true nor false, and ignored", path, do_sample)
    return _allowed(path, values)


def of_gguf(path: Where, fields: Mapping[str, Any]) -> dict[str, float]:
    """The same of the keys general.sampling.* of a GGUF file."""
    found = {name: fields.get(f"general.sampling.{key}") for key, name in GGUF_NAMES.items()}
    return _allowed(path, {name: _shortest(value) for name, value in found.items()})


def _allowed(path: Where, values: Mapping[str, Any]) -> dict[str, float]:
    kept = {}
    for name, value in values.items():
        if value is None:
            continue
        if name == "top_k" and value == 0 and value is not False:
            value = -1  # all tokens, there
        try:
            check_sampling_default(name, value)
            kept[name] = value
        except ValueError as error:
            log.warning("%s: a recommendation for sampling is ignored: %s", path, error)
    return kept


def _shortest(value: Any) -> Any:
    """A float as the shortest decimal of the same 32 bits, which is what was written."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
