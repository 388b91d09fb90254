"""Generation: one request, what turns its tokens into text, and what is delivered of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sf_local.engine.interrupts import Latch
from sf_local.request.output import Delivery, Delta, Logprobs, Output
from sf_local.request.params import ResolvedParams
from sf_local.request.request import Request
from sf_local.sampling.logprobs import PromptLogprobs
from sf_local.sampling.sampler import Sampled, Sampler
from sf_local.text.detokenizer import Detokenizer, StopChecker
from sf_local.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sf_local.grammar.matcher import Grammar
    from sf_local.text.tool_calls import AnswerParser


class Generation:
    """A request with what chooses its tokens and turns them into text.

    Made in the caller's thread, and used in the worker's from then on.

    Attributes:
        grammar: what its text must follow; None for free text.
        parser: takes tool calls and reasoning out of its text; None for text as it is.
        deliver: called with every piece of text, with the output at the end, or with an error.
        result: the output, or the error that ended it; None while it is under way. ended: set
            once there is one.
        remember: called at the end with the answer's token ids and text, so that prompts which
            contain this text are encoded to these tokens.
        is_streamed: whether text is delivered before the end; set by whoever reads it.
        has_sampled: whether the prompt is computed, so that the answer has begun.
        started_at, ready_at, deadline: `time.perf_counter()` from which timeout and latency count,
            at which prompt and parameters were ready, and at which the timeout passes; None for no
            timeout.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        grammar: Grammar | None = None,
        started_at: float | None = None,
        parser: AnswerParser | None = None,
    ) -> None:
        """started_at: `time.perf_counter()` from which timeout and latency count; else now."""
        self.request, self.grammar, params = request, grammar, request.params
        self.parser = parser
        self._parsed: list[Delta] = []  # what the parser took out of the text so far
        self.deliver: Callable[[Delivery], object] = lambda item: None
        self.remember: Callable[[Sequence[int], str], None] | None = None
        self.has_sampled = False
        self.is_streamed = False
        self.result: Output | BaseException | None = None
        self.ended = Latch()
        self._callbacks: list[Callable[[], object]] = []
        visible = parser.special_texts if parser else ()
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids, visible)
        self._stops = StopChecker(params.stop, tokenizer.special_tokens)
        self._stop_ids = _stop_ids(params, tokenizer, eos_ids)
        end_ids = self._stop_ids.keys() | (eos_ids if grammar is not None else ())
        self.sampler = Sampler(params, request.prompt_ids, end_ids)
        self._prompt_logprobs = _prompt_logprobs(request)
        request.takes_the_best = grammar is None and self.sampler.takes_the_best
        self._output_logprobs: list[Sampled] = []
        self._unread: list[int] = []  # tokens that have not become text
        self._text: list[str] = []
        self._num_delivered = 0  # of what is parsed, or of the text without a parser
        self._matched: str | int | None = None
        self.started_at = time.perf_counter() if started_at is None else started_at
        self._first_token_at = self.started_at
        self.ready_at = time.perf_counter()
        self.deadline = None if params.timeout is None else self.started_at + params.timeout

    def accept(self, sampled: Sampled, can_jump: bool) -> str | None:
        """Take a sampled token; the reason, if it ends the generation.

        With `can_jump` the tokens that the grammar then forces are taken as well.
        """
        reason = self._push(sampled)
        if self.grammar is None or reason == "stop":
            return reason
        self.grammar.accept(sampled.token)
        if self.grammar.is_complete:
            return "stop"
        return reason or self.jump(can_jump)

    def jump(self, can_jump: bool) -> str | None:
        """Take the tokens that the grammar forces; the reason, if the generation ends here."""
        if self.grammar is None or self.request.max_new_tokens == 0:
            return None
        forced, reason = self.grammar.forced() if can_jump else [], None
        for number, token in enumerate(forced, 1):
            reason = self._push(Sampled(token, 0.0))
            if reason == "stop" or (reason and number < len(forced)):
                return reason
        return "stop" if self.grammar.is_complete else reason

    def take_logits(self, position: int, logits: NDArray[np.float32]) -> None:
        """Logits [tokens, vocab] after the tokens of the prompt from `position` on; those that log
        probabilities were asked for are used."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.add(position, logits)

    def write(self) -> None:
        """Deliver what there is by now, to those who wait for parts of it."""
        if self.is_streamed or self.parser:  # which would have much to do at the end
            self._read()
        if self.is_streamed and (new := self._undelivered()):
            self.deliver((new, None))

    def _push(self, sampled: Sampled) -> str | None:
        """Append a token; the reason, if it ends the generation.

        It becomes text here if there are stop strings to look for, else when text is delivered.
        """
        request, token = self.request, sampled.token
        if not request.output_ids:
            self._first_token_at = time.perf_counter()
        request.append(token)
        self.sampler.push(token)
        request.takes_the_best = self.grammar is None and self.sampler.takes_the_best
        if request.params.return_logprob:
            self._output_logprobs.append(sampled)
        is_end = token in self._stop_ids and len(request.output_ids) > request.params.min_new_tokens
        if not is_end or token in self._stops.marks:  # a stop string may end with an end token
            self._unread.append(token)
        if request.params.stop:
            self._read()
            if self._stops.matched is not None:
                return "stop"
        if is_end:
            self._matched = self._stop_ids[token]
            return "stop"
        return "length" if len(request.output_ids) >= request.max_new_tokens else None

    def _read(self) -> None:
        """Turn new tokens into text."""
        push, marks = self._stops.push, self._stops.marks
        new = [push(marks.get(t, "") + self._detokenizer.push(t)) for t in self._unread]
        self._unread.clear()
        self._text += new
        if self.parser is not None:
            self._parsed.append(self.parser.push("".join(new)))

    def _undelivered(self) -> str | Delta:
        """What was read and not delivered."""
        parts: Sequence[Any] = self._text if self.parser is None else self._parsed
        new = parts[self._num_delivered :]
        self._num_delivered = len(parts)
        return "".join(new) if self.parser is None else Delta.joined(new)

    def finish(self, reason: str) -> tuple[str | Delta, Output]:
        """What was held back as one last delta, with the output."""
        self._read()
        rest = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self._text.append(rest)
        written = "".join(self._text)
        answer = Delta(written)
        if self.parser is not None:
            self._parsed += [self.parser.push(rest), self.parser.finish()]
            answer = Delta.joined(self._parsed)
        if self._stops.matched is not None:
            reason, self._matched = "stop", self._stops.matched
        request, now = self.request, time.perf_counter()
        schema = request.params.json_schema
        output = Output(
            text=answer.text,
            token_ids=request.output_ids,
            finish_reason=reason,
            matched=self._matched,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(request.output_ids),
            cached_tokens=request.num_cached or 0,
            time_to_first_token=self._first_token_at - self.started_at,
            latency=now - self.started_at,
            logprobs=self._logprobs(),
            tool_calls=answer.tool_calls,
            reasoning=answer.reasoning or None,
            schema=None if isinstance(schema, str | bool | Mapping) else schema,
            queue_time=(request.scheduled_at or now) - self.ready_at,
            request_id=request.sequence,
        )
        if self.remember is not None and request.output_ids:
            self.remember(request.output_ids, written)
        return self._undelivered(), output

    def end(self, last: Delivery) -> None:
        """Deliver the last delta with the output, or an error. Raises nothing: if that cannot be
        delivered, nobody is left to be told."""
        self.result = last if isinstance(last, BaseException) else last[1]
        self.ended.set()
        with contextlib.suppress(BaseException):
            self.deliver(last)
        self._call_back()

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call a function once there is a result, on the thread that ends the generation, or here
        if it has ended. What it raises is dropped."""
        self._callbacks.append(callback)
        if self.ended.is_set():
            self._call_back()

    def _call_back(self) -> None:
        with contextlib.suppress(IndexError):  # another thread may call the rest
            while True:
                callback = self._callbacks.pop()
                with contextlib.suppress(Exception):
                    callback()

    def output(self) -> Output:
        """The result of a generation that has ended; raises it if it is an error."""
        assert self.result is not None
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def _logprobs(self) -> Logprobs | None:
        if not self.request.params.return_logprob:
            return None
        logprobs = Logprobs() if self._prompt_logprobs is None else self._prompt_logprobs.result()
        logprobs.output = [sampled.logprob or 0.0 for sampled in self._output_logprobs]
        logprobs.make_later("output_top", [sampled.top for sampled in self._output_logprobs])
        return logprobs


def _prompt_logprobs(request: Request) -> PromptLogprobs | None:
    """Collects what is asked for of the prompt, and marks from where its logits are wanted."""
    params = request.params
    if not params.return_logprob or params.logprob_start_len < 0:
        return None
    if params.logprob_start_len < len(request.prompt_ids) - 1:
        request.first_logits = params.logprob_start_len
    return PromptLogprobs(request.prompt_ids, params.logprob_start_len, params.top_logprobs_num)


def _stop_ids(
    params: ResolvedParams, tokenizer: Tokenizer, eos_ids: frozenset[int]
) -> dict[int, str | int]:
    """Tokens that end a generation, and what to report as matched.

    Special tokens never show in the text, so a stop string that is one is matched by its id.
    """
    ids: dict[int, str | int] = {} if params.ignore_eos else {i: i for i in eos_ids}
    ids |= {i: i for i in params.stop_token_ids}
    for stop in params.stop:
        token = tokenizer.token_id(stop)
        if token in tokenizer.special_ids:
            ids[token] = stop
    return ids
