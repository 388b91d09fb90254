"""ShortfinLocal: the engine as an SGLang frontend backend. The only importer of sglang."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import ChatTemplate
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from sf_local.chat_template import resolve_chat_template
from sf_local.engine import Engine
from sf_local.errors import ChatTemplateError, RequestError
from sf_local.generation import Output
from sf_local.request import SamplingParams

# SglSamplingParams that are not served yet, with the value that asks for nothing.
_NOT_SERVED = {
    "min_new_tokens": 0, "n": 1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "return_logprob": False, "json_schema": None, "dtype": None, "regex": None,
}  # fmt: skip


class ShortfinLocal(BaseBackend):  # type: ignore[misc]
    """An SGLang backend that runs a compiled model inside this process.

    Args:
        vmfb: the artifact's folder, or its .vmfb file.
        device: "cpu", "hip" or "hip:N".
        chat_template: the name of an SGLang template, a ChatTemplate, or Jinja text; by default
            the model's own.
        config, parameters, tokenizer: files that do not lie beside the .vmfb.
        kv_pages, kv_memory: the size of the KV cache, as `Engine` takes it.
        defaults: what SGLang's arguments cannot carry: seed, priority and timeout.

    Raises ArtifactError, DeviceError or ChatTemplateError here; what a program asks for and cannot
    get raises RequestError, which SGLang keeps in `state.error()`.
    """

    is_chat_model = False

    def __init__(
        self,
        vmfb: str | Path,
        device: str = "cpu",
        *,
        chat_template: str | ChatTemplate | None = None,
        config: str | Path | None = None,
        parameters: str | Path | Sequence[str | Path] | None = None,
        tokenizer: str | Path | None = None,
        kv_pages: int | None = None,
        kv_memory: int | str | None = None,
        defaults: SamplingParams | None = None,
    ) -> None:
        super().__init__()
        self._defaults = defaults or SamplingParams()
        self.engine = Engine(
            vmfb,
            device,
            config=config,
            parameters=parameters,
            tokenizer=tokenizer,
            kv_pages=kv_pages,
            kv_memory=kv_memory,
        )
        try:
            self.chat_template = self._resolve(chat_template)
        except BaseException:
            self.shutdown()
            raise

    def get_model_name(self) -> str:
        """A folder from which transformers loads the tokenizer."""
        return str(self.engine.artifact.tokenizer)

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str, dict[str, Any]]:
        """The text that continues `s`, and its meta info as SGLang's server gives it."""
        output = self.engine.generate(_prompt(s), to_params(sampling_params, self._defaults))
        return output.text, meta_info(output)

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Text deltas with meta info; the last one carries the finish reason."""
        handle = self.engine.submit(_prompt(s), to_params(sampling_params, self._defaults))
        for delta, output in handle.deltas():
            yield delta, meta_info(output) if output else {"finish_reason": None}

    def select(
        self,
        s: StreamExecutor,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod | None = None,
    ) -> ChoicesDecision:
        raise RequestError("choices are not supported yet; generate text and compare it instead")

    def using(self, **overrides: Any) -> ShortfinLocal:
        """This backend with other `defaults`: `ask.run(..., backend=backend.using(seed=1))`."""
        view = copy.copy(self)
        view._defaults = replace(self._defaults, **overrides)
        return view

    def cache_prefix(self, prefix_str: str) -> None:
        """A hint from SGLang: what a batch of programs begins with."""
        self.engine.warm(prefix_str)

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """A hint from SGLang: the text so far is about to be forked."""
        self.engine.warm(str(s.text_))

    def flush_cache(self) -> None:
        """Free all KV pages that no request uses."""
        self.engine.flush_cache()

    def shutdown(self, drain: bool = False) -> None:
        """End the engine; generations under way fail, or are finished first with `drain`."""
        self.engine.shutdown(drain)

    def __enter__(self) -> ShortfinLocal:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _resolve(self, chat_template: str | ChatTemplate | None) -> ChatTemplate:
        tokenizer, name = self.engine.tokenizer, self.engine.artifact.name
        if chat_template is None and tokenizer.chat_template is None:
            return _NoTemplate(name=name, default_system_prompt=None, role_prefix_and_suffix={})
        return resolve_chat_template(chat_template, tokenizer, name)


class _NoTemplate(ChatTemplate):  # type: ignore[misc]
    """Of a base model: plain text works, roles raise."""

    def get_prefix_and_suffix(self, role: str, hist_messages: list[Any]) -> tuple[str, str]:
        raise ChatTemplateError(
            f"{self.name} has no chat template, so sgl.{role}() has no meaning; give one with "
            'ShortfinLocal(chat_template="chatml"), or write the prompt as plain text'
        )


def to_params(sampling: SglSamplingParams, defaults: SamplingParams) -> SamplingParams:
    """SGLang's parameters, over ours; RequestError for those that are not served yet."""
    for name, neutral in _NOT_SERVED.items():
        value = getattr(sampling, name)
        if value not in (None, neutral):
            raise RequestError(f"{name}={value!r} is not supported yet; leave it out")
    return replace(
        defaults,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=sampling.stop or (),
        stop_token_ids=sampling.stop_token_ids or (),
        ignore_eos=sampling.ignore_eos,
    )


def meta_info(output: Output) -> dict[str, Any]:
    """Keys and shapes of SGLang's meta_info, and our time to first token."""
    reason: dict[str, Any] = {"type": output.finish_reason}
    if output.matched is not None:
        reason["matched"] = output.matched
    elif output.finish_reason == "length":
        reason["length"] = output.completion_tokens
    return {
        "finish_reason": reason,
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "cached_tokens": output.cached_tokens,
        "e2e_latency": output.latency,
        "time_to_first_token": output.time_to_first_token,
    }


def _prompt(s: StreamExecutor) -> str:
    if s.images_:
        raise RequestError("images are not supported yet; remove sgl.image() from the program")
    return str(s.text_)
