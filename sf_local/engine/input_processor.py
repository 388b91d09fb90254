"""InputProcessor: turns prompts and parameters into checked generations, or refuses them."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

from sf_local.artifact.manifest import ImageSettings
from sf_local.artifact.open import Artifact
from sf_local.engine.generation import Generation
from sf_local.engine.interrupts import uninterrupted
from sf_local.errors import PromptTooLongError, RequestError
from sf_local.request.checks import plain_number, shown, unknown_name
from sf_local.request.params import (
    GRAMMARS,
    SAMPLING_NAMES,
    ResolvedParams,
    SamplingOptions,
    SamplingParams,
)
from sf_local.request.prompt import Prompt
from sf_local.request.request import Request
from sf_local.text.inserted_text import InsertedText, MarkedText
from sf_local.text.prompt_encoder import PromptEncoder
from sf_local.text.tokenizer import Tokenizer
from sf_local.vision.image_file import GivenImage, ImageInput
from sf_local.vision.reader import ImageReader

if TYPE_CHECKING:
    from sf_local.grammar.compiler import GrammarCompiler
    from sf_local.grammar.matcher import Grammar
    from sf_local.text.tool_calls import AnswerParser

    MakeGrammar = Callable[[GrammarCompiler], Grammar]

PromptInput = str | Sequence[int] | Prompt

# Of a model that was compiled with top_k, as amdsharktank can, and gives only the k likeliest
# tokens: these parameters could choose another token, or ask for the probability of one.
NEED_ALL_LOGITS = (
    "regex", "json_schema", "ebnf", "return_logprob", "min_new_tokens", "logit_bias",
    "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
NEUTRAL = ResolvedParams()
PROMPT_OF_CHAT = "make its prompt, engine.apply_chat_template(messages, add_generation_prompt=True)"
# Held while the grammar compiler is imported and built. A fork waits for it: a child that is forked
# meanwhile waits for ever for the module, or for llguidance.
_grammar_lock = threading.Lock()
os.register_at_fork(
    before=_grammar_lock.acquire,
    after_in_parent=_grammar_lock.release,
    after_in_child=_grammar_lock.release,
)


class RequestOptions(SamplingOptions, total=False):
    """What every entry point of Engine takes besides prompt and parameters; see `Engine.submit`."""

    images: Sequence[ImageInput]


def _image_reader(
    artifact: Artifact, tokenizer: Tokenizer, max_bytes: int, allow_urls: bool
) -> ImageReader | None:
    """None for a text model."""
    settings = artifact.manifest and artifact.manifest.images
    if not settings:
        return None
    return ImageReader(ImageSettings(**settings), tokenizer, max_bytes, allow_urls)


def _eos_ids(artifact: Artifact, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends an answer: all that config.json, generation_config.json and the tokenizer say."""
    declared = artifact.manifest.eos_token_ids if artifact.manifest else ()
    return tokenizer.end_ids | frozenset(declared)


def split_options(
    params: Any, options: Mapping[str, Any], kind: type = RequestOptions
) -> tuple[Any, dict[str, Any]]:
    """The parameters, which are `params` or else the keyword options that are named so; and the
    other options.

    kind: the TypedDict of all options. Raises RequestError for `params` beside such options, and
    for an option that is none.
    """
    for name, value in options.items():
        if name not in kind.__annotations__:
            raise unknown_name(name, value, kind.__annotations__)
    sampling = {name: value for name, value in options.items() if name in SAMPLING_NAMES}
    others = {name: value for name, value in options.items() if name not in sampling}
    if params is None:
        return SamplingParams.from_dict(sampling), others
    if sampling:
        name = next(iter(sampling))
        raise RequestError(
            f"{name}={shown(sampling[name])} beside params: give one of them; params can hold all"
        )
    return params, others


def _given(name: str, params: SamplingParams | None) -> dict[str, Any]:
    """What `params` give, by name; raises RequestError, which calls them `name`, for no params."""
    if not isinstance(params, SamplingParams | None):
        raise RequestError(f"{name}={shown(params)} must be SamplingParams")
    return params.given() if params else {}


def deadline_of(params: SamplingParams, started_at: float) -> float | None:
    """When the timeout of a request passes that was made at `started_at`, both by
    `time.perf_counter()`; None for no timeout."""
    return None if params.timeout is None else started_at + params.timeout


class InputProcessor:
    """Makes generations that can be computed: whatever is refused is refused here.

    max_tokens: of a prompt and its answer. defaults: parameters where a request gives none. Raises
    RequestError for those that cannot hold together.
    """

    def __init__(
        self, artifact: Artifact, tokenizer: Tokenizer, max_tokens: int, image_bytes: int,
        allow_urls: bool, reuse_answer_tokens: bool, defaults: SamplingParams | None = None,
    ) -> None:  # fmt: skip
        self.artifact, self.tokenizer, self.max_tokens = artifact, tokenizer, max_tokens
        manifest = artifact.manifest
        self.vocab_size = manifest.vocab_size if manifest else tokenizer.vocab_size
        self._images = _image_reader(artifact, tokenizer, image_bytes, allow_urls)
        self._eos_ids = _eos_ids(artifact, tokenizer)
        self._encode = PromptEncoder(tokenizer)
        self.reuses_answer_tokens = reuse_answer_tokens
        self._grammars: GrammarCompiler | None = None
        self._inserted: InsertedText | None = None
        recommended = manifest.sampling_defaults if manifest else {}
        self._defaults = {**recommended, **_given("defaults", defaults)}
        self.resolved(None)

    def resolved(self, params: SamplingParams | None) -> ResolvedParams:
        """As `Engine.resolved`; what is resolved stays as it is."""
        if isinstance(params, ResolvedParams):
            return params
        given, defaults = _given("params", params), self._defaults
        if params is not None and params.is_constrained:
            defaults = {name: defaults[name] for name in defaults.keys() - GRAMMARS}
        return ResolvedParams(**(defaults | given))

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made on first use, with its imports: they take a tenth of the time of all, and few need
        it."""
        with _grammar_lock:
            if self._grammars is None:
                import llguidance  # noqa: F401 - the compiler does it even later

                from sf_local.grammar.compiler import GrammarCompiler

                compiler = GrammarCompiler(self.tokenizer, self.vocab_size, self._eos_ids)
                compiler.build()
                self._grammars = compiler
            return self._grammars

    def given(self, images: Sequence[ImageInput]) -> list[GivenImage]:
        """Images for several prompts, so that each is read once; raises RequestError."""
        self.check_images(images)
        return [self._images.given(image) for image in images] if self._images else []

    def prepare(
        self, prompt: PromptInput, images: Sequence[ImageInput] = (), deadline: float | None = None
    ) -> Prompt:
        """A prompt that can be submitted many times, and is encoded only here.

        deadline: a `time.perf_counter()`. Raises RequestError as `submit` does, and once it has
        passed while images wait for others; ImageError for an image that cannot be used.
        """
        if isinstance(prompt, Prompt):
            if images:
                raise RequestError("images: the prompt was prepared with its own; give one or none")
            # It may come from another engine, whose model has other tokens, or no images
            self._prompt_ids([max(prompt.ids)] if prompt.ids else [])
            self.check_images(prompt.spans)
            return self._fitting(prompt)
        self.check_images(images)
        ids = self._prompt_ids(prompt)
        ready = Prompt(ids, ids)
        if self._images is not None:
            ready = self._images.expand(ids, images, self.max_tokens, deadline)
        # Of a marked text the same text without marks would have other tokens
        is_text = isinstance(prompt, str) and not isinstance(prompt, MarkedText)
        return replace(self._fitting(ready), text=cast(str, prompt) if is_text else None)

    def check_images(self, images: Sequence[object]) -> None:
        """Raise RequestError unless it is a list of images, and the model sees."""
        if not isinstance(images, Sequence) or isinstance(images, str | bytes | bytearray):
            raise RequestError(f"images={shown(images)} must be a list; put a single one in []")
        if images and self._images is None:
            raise RequestError(
                f"images: {len(images)} given, but {self.artifact.name} is a text model; compile "
                "one that sees, such as SmolVLM or LLaVA-1.5"
            )

    def generation(
        self,
        prompt: PromptInput,
        params: SamplingParams | None,
        images: Sequence[ImageInput] = (),
        started_at: float | None = None,
        parser: AnswerParser | None = None,
        make_grammar: MakeGrammar | None = None,
    ) -> Generation:
        """A request with all that its answer needs; raises as `Engine.submit` does.

        started_at: `time.perf_counter()` of the call; else now. parser: of a chat's answer.
        make_grammar: makes the answer's grammar, if that is not one of the parameters'.
        """
        params = self.resolved(params)
        if params.n != 1:
            raise RequestError(f"n={params.n}: several answers to one prompt come from `samples`")
        started_at = time.perf_counter() if started_at is None else started_at
        ready = self.prepare(prompt, images, deadline_of(params, started_at))
        self._check_params(params, len(ready.ids))
        max_new_tokens = min(params.max_new_tokens, self.max_tokens - len(ready.ids))
        request = Request(
            ready.ids, params, max_new_tokens, spans=ready.spans, prompt_keys=ready.keys
        )
        if make_grammar is None and params.is_constrained:
            make_grammar = functools.partial(_grammar, params)
        grammar = None
        if make_grammar is not None:  # llguidance drops or renames what raises in Python's code
            make = make_grammar
            grammar = uninterrupted(lambda: make(self._grammar_compiler()))
        generation = Generation(request, self.tokenizer, self._eos_ids, grammar, started_at, parser)
        if ready.text is not None and self.reuses_answer_tokens:
            generation.remember = functools.partial(self._encode.remember, ready.text, ready.plain)
        return generation

    def _check_params(self, params: ResolvedParams, prompt_len: int) -> None:
        """What depends on the model or the prompt; the rest was checked when they were made."""
        if self.artifact.config.top_k is not None:
            _check_top_k(params, self.artifact.config.top_k)
        self._check_tokens("logit_bias", params.logit_bias)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        if params.top_logprobs_num > self.vocab_size:
            raise RequestError(
                f"top_logprobs_num={params.top_logprobs_num}: the model has {self.vocab_size} "
                "tokens"
            )
        if params.return_logprob and params.logprob_start_len >= prompt_len:
            raise RequestError(
                f"logprob_start_len={params.logprob_start_len}: the prompt has {prompt_len} "
                "tokens; give a smaller position, or -1 for none of them"
            )

    def _check_tokens(self, name: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            is_id = isinstance(token, Integral) and not isinstance(token, bool)
            if not (is_id and 0 <= token < self.vocab_size):
                raise RequestError(
                    f"{name}: {shown(token)} is no token id; the model has 0 to "
                    f"{self.vocab_size - 1}"
                )

    def encode(self, prompt: str, continuation: str = "") -> list[int]:
        """As `Engine.encode`."""
        if isinstance(prompt, MarkedText):
            parts = self.inserted_text().parts(prompt + continuation)
            return self.tokenizer.with_bos(self.tokenizer.encode_parts(parts))
        return self._encode(prompt + continuation, len(prompt))

    def inserted_text(self) -> InsertedText:
        """What finds special tokens that users wrote; made on first use."""
        if self._inserted is None:
            self._inserted = InsertedText(self.tokenizer.special_tokens)
        return self._inserted

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif isinstance(prompt, Sequence) and any(isinstance(t, Mapping) for t in prompt[:1]):
            raise RequestError("prompt is a chat: answer it by `chat`; or " + PROMPT_OF_CHAT)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"prompt={shown(prompt)} must be a str, or a list of token ids")
        else:
            ids = [cast(int, plain_number(token)) for token in prompt]
        if not ids:
            raise RequestError("prompt is empty; give at least one token (a BOS, or a space)")
        self._check_tokens("prompt", ids)
        return ids

    def _fitting(self, prompt: Prompt) -> Prompt:
        """The prompt; PromptTooLongError if the context has no room for it and an answer."""
        if len(prompt.ids) >= self.max_tokens:
            of_images = sum(span.end - span.start for span in prompt.spans)
            whose = f" ({of_images} of images)" if of_images else ""
            raise PromptTooLongError(
                f"prompt: {len(prompt.ids)} tokens{whose} leave no room for an answer in a context "
                f"of {self.max_tokens}; {self._longer_context()}"
            )
        return prompt

    def _longer_context(self) -> str:
        """How the context gets longer: what limits it is the KV cache, or the compiled model."""
        if self.max_tokens < self.artifact.max_tokens:
            most = self.artifact.max_tokens
            return f"shorten it, or raise kv_memory, up to the model's {most} tokens"
        known = manifest.source.get("max_seq_len") if (manifest := self.artifact.manifest) else None
        if known is None:
            return "shorten it, or compile the model for more, if it was trained for more"
        if known - self.max_tokens < self.artifact.config.page_size:
            return "shorten it; the model was trained for no more"
        return (
            f"shorten it, or compile the model for up to {known}: sf-compile SOURCE --max-seq-len N"
        )


def _grammar(params: ResolvedParams, grammars: GrammarCompiler) -> Grammar:
    """Of parameters that have one."""
    if params.regex is not None:
        return grammars.regex(params.regex)
    if params.json_schema is not None:
        return grammars.json_schema(params.json_schema)
    return grammars.ebnf(cast(str, params.ebnf))


def _check_top_k(params: ResolvedParams, k: int) -> None:
    """Raise RequestError for what the k likeliest tokens do not suffice for."""
    for name in NEED_ALL_LOGITS:
        value = getattr(params, name)
        if value != getattr(NEUTRAL, name):
            raise needs_all_logits(name, value, k)
    if not (params.is_greedy or 1 <= params.top_k <= k):
        allowed = "top_k=1" if k == 1 else f"top_k from 1 to {k}"
        raise RequestError(
            f"top_k={params.top_k}: the model was compiled with top_k={k} and gives only so many "
            f"tokens to draw from; use temperature=0, or {allowed}"
        )


def needs_all_logits(name: str, value: object, k: int) -> RequestError:
    """The refusal of a parameter by a model that gives the k likeliest tokens only."""
    return RequestError(
        f"{name}={shown(value)} needs the logits of all tokens, but the model was compiled with "
        f"top_k={k} and gives only the likeliest; leave it out, or export the model without top_k"
    )
