"""Request: one prompt, its answer so far, and how far it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from sf_local.request.params import SamplingParams
from sf_local.request.prompt import Span


class RequestStatus(Enum):
    """Where a request is: it may wait again after it ran, when others need its pages."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One prompt and its growing answer. All but the first four fields are the scheduler's.

    The keys and values of the first `num_computed` tokens are in `pages`; those of the first
    `num_published` tokens are in the prefix cache, too, for other requests.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    max_new_tokens: int  # params.max_new_tokens, cut at the end of the context
    output_ids: list[int] = field(default_factory=list)
    sequence: int = -1  # order of arrival at the scheduler; -1 before
    status: RequestStatus = RequestStatus.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    num_cached: int | None = None  # tokens found in the cache when it first started
    takes_the_best: bool = False  # the next token is the best one, so its logits are not needed
    first_logits: int | None = None  # all logits from this position on are wanted
    spans: Sequence[Span] = ()  # where image tiles are in the prompt
    prompt_keys: Sequence[int] = ()  # what the cache compares instead of prompt_ids: Prompt.keys
    prefix_leader: Request | None = None  # it computes the first `prefix_len` tokens for both
    prefix_len: int = 0
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "timeout"

    @property
    def num_reusable(self) -> int:
        """The most tokens to take from the cache: those whose logits are not wanted."""
        last = self.num_tokens - 1
        return last if self.first_logits is None else min(last, self.first_logits)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute, and it is no image token."""
        is_last = self.num_computed == self.num_tokens - 1
        return is_last and not (self.spans and self.spans[-1].end == self.num_tokens)

    @property
    def is_jumping(self) -> bool:
        """Whether several tokens of the answer are left to compute, and none of the prompt.

        That is so after a grammar forced several tokens.
        """
        return len(self.prompt_ids) <= self.num_computed < self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt and answer."""
        return self._slice(self.prompt_ids, start, end)

    def keys(self, count: int) -> list[int]:
        """What the cache compares for the first `count` tokens."""
        return self._slice(self.prompt_keys or self.prompt_ids, 0, count)

    def _slice(self, prompt: Sequence[int], start: int, end: int) -> list[int]:
        prompt_len = len(prompt)
        head = list(prompt[start:end])
        return head + self.output_ids[max(start - prompt_len, 0) : max(end - prompt_len, 0)]
