"""SamplingParams and Request: what a caller asks for, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from sf_local.request.params import SamplingParams

if TYPE_CHECKING:
    from sf_local.request.prompt import Span


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One prompt and its growing answer. All but the first four fields are the scheduler's.

    The first `num_computed` tokens have their keys and values in `pages`; others can find the first
    `num_published` of them in the cache.
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
    takes_the_best: bool = False  # whether the next token is the likeliest, whatever the others are
    first_logits: int | None = None  # the logits from this position on are wanted, too
    spans: Sequence[Span] = ()  # of the prompt, where tiles of images are
    prompt_keys: Sequence[int] = ()  # what the cache knows the prompt by, if not its ids
    prefix_leader: Request | None = None  # computes the first `prefix_len` tokens for both
    prefix_len: int = 0
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "timeout"

    @property
    def num_reusable(self) -> int:
        """Tokens that may come from the cache: the last one's logits are always wanted."""
        last = self.num_tokens - 1
        return last if self.first_logits is None else min(last, self.first_logits)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute, and it shows no image."""
        is_last = self.num_computed == self.num_tokens - 1
        return is_last and not (self.spans and self.spans[-1].end == self.num_tokens)

    @property
    def is_jumping(self) -> bool:
        """Whether the prompt is computed, but more than the last token is left of the answer."""
        return len(self.prompt_ids) <= self.num_computed < self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of the prompt and the answer."""
        return self._slice(self.prompt_ids, start, end)

    def keys(self, count: int) -> list[int]:
        """What the cache knows the first `count` tokens by."""
        return self._slice(self.prompt_keys or self.prompt_ids, 0, count)

    def _slice(self, prompt: Sequence[int], start: int, end: int) -> list[int]:
        prompt_len = len(prompt)
        head = list(prompt[start:end])
        return head + self.output_ids[max(start - prompt_len, 0) : max(end - prompt_len, 0)]
