"""Request: one prompt with its growing answer, and how far its computation has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from sf_local.request.params import ResolvedParams

if TYPE_CHECKING:
    from sf_local.request.prompt import Span


class RequestStatus(Enum):
    """Where a request is: in the scheduler's queue, on KV pages, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt and the answer so far. `append` adds tokens; nothing is ever taken back.

    The caller of the engine decides prompt_ids, params, max_new_tokens, spans and prompt_keys; the
    generation decides takes_the_best and first_logits; the scheduler owns the rest. The first
    `num_computed` tokens have their keys and values in `pages`, and the first `num_published` of
    them can be found in the prefix cache by other requests.

    Attributes:
        max_new_tokens: `params.max_new_tokens`, or less where the context ends before.
        spans: positions of the prompt that show tiles of images.
        prompt_keys: what the prefix cache knows the prompt by, if not by its token ids.
        takes_the_best: the next token is the likeliest, so its logits need not be fetched.
        first_logits: logits from this position of the prompt on are collected; None for none.
        num_tokens: length of prompt and answer together.
        sequence: order of arrival at the scheduler; -1 before it arrived.
        num_cached: prompt tokens found in the prefix cache when the request first started.
        scheduled_at: `time.perf_counter()` of that moment.
        prefix_leader: a running request that computes the first `prefix_len` tokens for both.
        finish_reason: "stop", "length", "abort" or "timeout".
    """

    prompt_ids: Sequence[int]
    params: ResolvedParams
    max_new_tokens: int
    output_ids: list[int] = field(default_factory=list)
    spans: Sequence[Span] = ()
    prompt_keys: Sequence[int] = ()
    takes_the_best: bool = False
    first_logits: int | None = None
    num_tokens: int = field(init=False)
    sequence: int = -1
    status: RequestStatus = RequestStatus.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    num_cached: int | None = None
    scheduled_at: float | None = None
    prefix_leader: Request | None = None
    prefix_len: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_ids) + len(self.output_ids)

    def append(self, token: int) -> None:
        """Add a token to the answer."""
        self.output_ids.append(token)
        self.num_tokens += 1

    @property
    def num_reusable(self) -> int:
        """Tokens whose keys and values may come from the cache. The last token's may not, because
        its logits are always needed."""
        last = self.num_tokens - 1
        return last if self.first_logits is None else min(last, self.first_logits)

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute, and it shows no image."""
        is_last = self.num_computed == self.num_tokens - 1
        return is_last and not (self.spans and self.spans[-1].end == self.num_tokens)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start .. end - 1 of prompt and answer."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : max(end - num_prompt, 0)]
        return [*self.prompt_ids[start:end], *self.output_ids[: max(end - num_prompt, 0)]]

    def keys(self, end: int, start: int = 0) -> list[int]:
        """What the prefix cache knows the tokens at positions start .. end - 1 by."""
        prompt, num_prompt = self.prompt_keys or self.prompt_ids, len(self.prompt_ids)
        answer = self.output_ids[max(start - num_prompt, 0) : max(end - num_prompt, 0)]
        return [*prompt[start:end], *answer]
