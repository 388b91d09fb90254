"""What a request returns: its text, log probabilities, and scores of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sf_local.request.checks import told_fields


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
        id: nine letters and digits, by which the result refers to the call: Mistral's templates
            accept no other length. The model's own if it wrote one, else random.
        name: of one of the tools that the model was given.
        arguments: by name, as JSON has them. Only those of `tool_choice="required"` and of a tool's
            name are sure to be valid under the tool's schema.
    """

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Delta:
    """What some more of an answer added: text to show, reasoning, and calls that became whole."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)

    @staticmethod
    def joined(deltas: Sequence[Delta]) -> Delta:
        """All of them, one after the other."""
        return Delta(
            "".join(delta.text for delta in deltas),
            "".join(delta.reasoning for delta in deltas),
            tuple(call for delta in deltas for call in delta.tool_calls),
        )


@dataclass(frozen=True)
class Output:
    """A finished generation.

    Attributes:
        text: the answer without stop strings and special tokens; of a chat, without tool calls and
            reasoning.
        token_ids: all new tokens, with the one that ended the answer.
        finish_reason: "stop", "length", "abort" or "timeout".
        matched: the stop string or the token id that ended the answer; None if none did.
        prompt_tokens, completion_tokens: the lengths of prompt and answer.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        time_to_first_token, latency: seconds from submit to the first token, and to the last.
        logprobs: log probabilities, with `return_logprob`.
        tool_calls: calls of tools that a chat was given, those that are whole.
        reasoning: what a chat's answer holds in <think>, without the tags; None without them.
        schema: the pydantic model or the type that was given as `json_schema`, for `parsed`.
        queue_time: seconds from when prompt and parameters were ready until its computation began,
            or until the end, if it never did.
        request_id: the number of the request among those of its device, in order of arrival, as in
            the log and in traces.
        index: the number of its prompt in a list or in `Engine.map`, from 0 on; else None.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    time_to_first_token: float
    latency: float
    logprobs: Logprobs | None = None
    tool_calls: Sequence[ToolCall] = ()
    reasoning: str | None = None
    queue_time: float = 0.0
    request_id: int | None = None
    index: int | None = None
    schema: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        return told_fields(self)

    @property
    def parsed(self) -> Any:
        """The answer as an instance of `schema`; None without one, such as for a schema that was
        given as a dict or as text, and if the answer was cut short.

        Raises pydantic.ValidationError if validators of the model itself refuse the answer.
        """
        if self.schema is None or self.finish_reason != "stop":
            return None
        if "_parsed" not in self.__dict__:
            import pydantic  # takes 0.1 s

            adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(self.schema)
            self.__dict__["_parsed"] = adapter.validate_json(self.text)
        return self.__dict__["_parsed"]


# What is new, with the output at the end; Delta for a chat that may call tools or reason
Delivery = tuple[str | Delta, Output | None] | BaseException

Top = list[tuple[float, int]]  # the likeliest tokens: (log probability, token), best first


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The likeliest tokens in the place of one, best first, in a tenth of the memory of a `Top`.

    logprobs: f64 [k]. ids: int32 [k].
    """

    logprobs: NDArray[np.float64]
    ids: NDArray[np.int32]

    def pairs(self) -> Top:
        """The same as Python objects."""
        return list(zip(self.logprobs.tolist(), self.ids.tolist(), strict=True))


NO_TOP = TopTokens(np.empty(0), np.empty(0, np.int32))


@dataclass
class Logprobs:
    """Natural log probabilities of the tokens of a prompt, from some position on, and its answer.

    Attributes:
        prompt_ids: the prompt's tokens from that position on.
        prompt: their log probabilities, by the model's own distribution. The first one is None, as
            it is not conditioned on anything.
        prompt_top: the likeliest tokens in the place of each.
        output: the answer's, by the distribution they were drawn from, without top-k, top-p and
            min-p. 0 for tokens that a grammar forced.
        output_top: the likeliest tokens in the place of each.
    """

    prompt_ids: Sequence[int] = ()
    prompt: list[float | None] = field(default_factory=list)
    prompt_top: list[Top | None] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    output_top: list[Top] = field(default_factory=list)

    def make_later(self, name: str, tops: Sequence[TopTokens | None]) -> None:
        """Let "prompt_top" or "output_top" be a list of these that is made when it is first read.

        So the thread that reads it makes its many objects, and not the engine's, for which all
        other requests wait.
        """
        delattr(self, name)
        self.__dict__[f"_{name}"] = tops

    if not TYPE_CHECKING:  # which would let any name pass

        def __getattr__(self, name: str) -> list[Top | None]:
            """A list of `make_later`."""
            tops = self.__dict__.get(f"_{name}")
            if tops is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            made = [None if top is None else top.pairs() for top in tops]
            setattr(self, name, made)
            return made


@dataclass(frozen=True)
class Score:
    """Natural log probabilities of the tokens of a continuation, each given all tokens before it.

    Attributes:
        token_ids: the tokens of prompt and continuation, tokenized as one text, after those that
            the prompt alone has as well. A token that spans the border of both is among them.
        logprobs: their log probabilities.
        unconditional: their log probabilities without the prompt, if asked for; None for the first,
            as it is not conditioned on anything.
        prompt_tokens, cached_tokens: tokens of the prompt, and how many the prefix cache had.
    """

    token_ids: list[int]
    logprobs: list[float]
    unconditional: list[float | None] | None
    prompt_tokens: int
    cached_tokens: int

    @property
    def mean(self) -> float:
        """The mean of `logprobs`."""
        return sum(self.logprobs) / len(self.logprobs)
