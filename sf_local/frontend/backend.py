"""ShortfinLocal: the engine as a backend that runs programs of SGLang's frontend language.

Importing this module attaches the class to sglang, as `sgl.ShortfinLocal`.
"""

from __future__ import annotations

import base64
import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, cast

import sglang
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import ChatTemplate
from sglang.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    token_length_normalized,
)
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from sf_local.engine.engine import BackendOptions, Engine
from sf_local.errors import RequestError
from sf_local.frontend.sgl_chat_template import resolve_chat_template
from sf_local.frontend.translation import entries, meta_info, to_params
from sf_local.request.checks import shown
from sf_local.request.output import Output, Score
from sf_local.request.params import SamplingParams
from sf_local.vision.image_file import ImageInput


class TokenUsage:
    """Counts the tokens of a backend's requests; usable from any thread.

    Attributes:
        prompt_tokens: of all prompts, those found in the prefix cache included.
        cached_tokens: of all prompts, those found in the prefix cache.
        completion_tokens: of all answers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0

    def add(self, outputs: Sequence[Output | Score]) -> None:
        """Count the tokens of finished requests; scores have no answer."""
        with self._lock:
            for output in outputs:
                self.prompt_tokens += output.prompt_tokens
                self.cached_tokens += output.cached_tokens
                self.completion_tokens += getattr(output, "completion_tokens", 0)


class ShortfinLocal(BaseBackend):  # type: ignore[misc]
    """An SGLang backend that runs a compiled model inside this process.

    Args:
        vmfb: the artifact's folder, or its .vmfb file.
        device: a name or a list of names, as `Engine` takes it.
        chat_template: the name of an SGLang template, a ChatTemplate, or Jinja text; by default
            the model's own.
        defaults: for what SGLang's arguments cannot express: seed, repetition_penalty, logit_bias,
            ebnf, priority and timeout; and stops, to which those of a program are added.
        engine_options: all other options of `Engine`.

    Attributes:
        engine: the Engine that generates.
        chat_template: SGLang's ChatTemplate that roles are written with.
        token_usage: counts of the tokens of all requests.

    Raises:
        ArtifactError, DeviceError: as Engine does.
        ChatTemplateError: there is no such template, or a Jinja text that has no roles. What the
            model's own template does beyond SGLang's prefixes and suffixes is told by a warning.
        RequestError: `defaults` are no SamplingParams. A program that asks for what it cannot get
            ends with a RequestError as well, which SGLang keeps in `state.error()`.
    """

    is_chat_model = False

    def __init__(
        self,
        vmfb: str | Path,
        device: str | Sequence[str] = "cpu",
        *,
        chat_template: str | ChatTemplate | None = None,
        defaults: SamplingParams | None = None,
        **engine_options: Unpack[BackendOptions],
    ) -> None:
        super().__init__()
        self._defaults = SamplingParams() if defaults is None else defaults
        if not isinstance(self._defaults, SamplingParams):
            raise RequestError(f"defaults={shown(defaults)} must be SamplingParams")
        self.token_usage = TokenUsage()
        self._escapes = engine_options.get("escape_special_tokens", True)
        self.engine = Engine(vmfb, device, **engine_options)
        try:
            self.chat_template = resolve_chat_template(
                chat_template,
                self.engine.tokenizer,
                self.engine.artifact.name,
                self.engine.image_token,
            )
        except BaseException:
            self.shutdown()
            raise

    def get_model_name(self) -> str:
        """The folder of the tokenizer, from which transformers can load it too."""
        return str(self.engine.artifact.tokenizer)

    @property
    def endpoint(self) -> ShortfinLocal:
        """The backend itself: `sgl.flush_cache()` and others ask for it, as of a Runtime."""
        return self

    def get_server_info(self) -> dict[str, Any]:
        """The loaded model's paths and context, and the counters of `Engine.stats()`."""
        engine = self.engine
        return {
            "model_path": self.get_model_name(),
            "artifact": str(engine.artifact.vmfb.parent),
            "max_total_num_tokens": engine.max_tokens,
            **engine.stats(),
        }

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str | list[str], Any]:
        """The text that continues `s`, and its meta info in the form of SGLang's server.

        With n > 1 both are lists; SGLang continues the program with the first text.

        Raises:
            RequestError: a parameter or an image is not allowed, or the prompt is too long.
            EngineError: the generation failed.
        """
        params = to_params(sampling_params, self._defaults)
        outputs = self.engine.samples(self._text(s), params, images=_images(s))
        self.token_usage.add(outputs)
        infos = [meta_info(o, self.engine.tokenizer, sampling_params) for o in outputs]
        if params.n == 1:
            return outputs[0].text, infos[0]
        return [output.text for output in outputs], infos

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """New text piece by piece, with meta info, which is complete in the last one only.

        Raises:
            RequestError: as `generate` does; or n > 1, since a stream is one text.
            EngineError: the generation failed.
        """
        params = to_params(sampling_params, self._defaults)
        if params.n > 1:
            raise RequestError(f"n={params.n}: a stream is one text; use n=1, or stream=False")
        handle = self.engine.submit(self._text(s), params, images=_images(s))
        for delta, output in handle.deltas():
            text = cast(str, delta)  # Delta is for chats only
            if output is None:
                yield text, {"finish_reason": None}
            else:
                self.token_usage.add([output])
                yield text, meta_info(output, self.engine.tokenizer, sampling_params)

    def select(
        self,
        s: StreamExecutor,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod = token_length_normalized,
    ) -> ChoicesDecision:
        """The choice that `choices_method` prefers, by the log probabilities of all after `s`.

        Raises:
            RequestError: a choice is empty or too long, `temperature` is not 0, or
                `choices_method` is not one of SGLang's.
            EngineError: scoring failed.
        """
        if not (isinstance(temperature, (int, float)) and 0 <= temperature <= 1e-5):
            raise RequestError(
                f"temperature={shown(temperature)}: choices are scored, not sampled; use 0"
            )
        if not isinstance(choices_method, ChoicesSamplingMethod):
            raise RequestError(
                f"choices_method={shown(choices_method)} must be one of sgl's, such as "
                "sgl.token_length_normalized, or a ChoicesSamplingMethod of your own"
            )
        unconditional = choices_method.requires_unconditional_logprobs
        scores = self.engine.score(
            self._text(s), choices, unconditional=unconditional, params=self._defaults,
            images=_images(s),
        )  # fmt: skip
        self.token_usage.add(scores)
        tokenizer = self.engine.tokenizer
        return choices_method(
            choices=choices,
            normalized_prompt_logprobs=[score.mean for score in scores],
            input_token_logprobs=[
                entries(score.logprobs, score.token_ids, tokenizer) for score in scores
            ],
            output_token_logprobs=[[] for _ in scores],
            unconditional_token_logprobs=[
                entries(score.unconditional, score.token_ids, tokenizer)
                for score in scores
                if score.unconditional is not None
            ]
            or None,
        )

    def using(self, **overrides: Any) -> ShortfinLocal:
        """The same engine with other `defaults`: `ask.run(..., backend=backend.using(seed=1))`.

        Raises:
            RequestError: a parameter is out of range.
        """
        view = copy.copy(self)
        view._defaults = replace(self._defaults, **overrides)
        return view

    def cache_prefix(self, prefix_str: str) -> None:
        """A hint from SGLang: the programs of a batch begin with this text."""
        self.engine.warm(prefix_str)

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """A hint from SGLang: the program is about to be forked at its text so far."""
        self.engine.warm(self._text(s), images=_images(s))

    def flush_cache(self) -> None:
        """Empty the prefix cache, except for pages that requests use."""
        self.engine.flush_cache()

    def shutdown(self, drain: bool = False) -> None:
        """End the engine; with `drain` after all generations under way, which otherwise fail."""
        self.engine.shutdown(drain)

    def __enter__(self) -> ShortfinLocal:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _text(self, s: StreamExecutor) -> str:
        """The program's text so far, with images written as the model's own template does, and
        special tokens in the contents of roles as plain text."""
        text = str(s.text_)
        if self._escapes:
            text = self.engine.mark_inserted(text, content_spans(s))
        image_first = getattr(self.chat_template, "image_first", None)
        return type(text)(text.replace(*image_first)) if image_first else text


def content_spans(s: StreamExecutor) -> list[tuple[int, int]]:
    """Where in a program's text the contents of its roles are, the one under way included.

    SGLang keeps messages and the text, but not where one is in the other.
    """
    text, spans, end = str(s.text_), list[tuple[int, int]](), 0
    for number, message in enumerate(s.messages_):
        content = message["content"]
        if isinstance(content, list):  # a text with images
            content = content[0]["text"]
        prefix, suffix = s.chat_template.get_prefix_and_suffix(
            message["role"], s.messages_[:number]
        )
        begin = _find(text, prefix, content + suffix, end)
        if begin is not None:
            end = begin + len(content)
            spans.append((begin, end))
    if s.cur_role is not None:
        spans.append((s.cur_role_begin_pos, len(text)))
    return spans


def _find(text: str, prefix: str, content: str, start: int) -> int | None:
    """Where a content stands behind its prefix and blanks, of which SGLang has stripped it."""
    while (found := text.find(prefix, start)) >= 0:
        begin = found + len(prefix)
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        if text.startswith(content, begin):
            return begin
        start = found + 1
    return None


def _images(s: StreamExecutor) -> list[ImageInput]:
    """The images of the program so far.

    SGLang has read files already. PIL images are taken as they were given, because SGLang's copies
    lack the EXIF orientation.
    """
    return [
        base64.b64decode(data) if isinstance(given, (str, bytes)) else given
        for given, data in s.images_
    ]


sglang.ShortfinLocal = ShortfinLocal
