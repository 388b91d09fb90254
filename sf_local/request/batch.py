"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sf_local.request.prompt import Span
from sf_local.request.request import Request, RequestStatus


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence at positions start .. start + len(tokens) - 1, and all its pages.

    spans: where tiles, which have embeddings, take the place of tokens.
    """

    tokens: Sequence[int]
    start: int
    page_ids: Sequence[int]
    spans: Sequence[Span] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one request, to be computed in one call.

    is_last: whether the next token is sampled after it. needs_logits: whether its last token's
    logits are needed for that; else the best token is enough. wants_all_logits: whether the
    logits of other tokens are wanted as well. spans: tiles of which it shows something.
    """

    request: Request
    start: int
    end: int
    is_last: bool
    needs_logits: bool
    wants_all_logits: bool
    spans: Sequence[Span] = ()

    @classmethod
    def of(cls, request: Request, end: int) -> Chunk:
        """What follows the computed tokens of a request, up to `end`."""
        start, first = request.num_computed, request.first_logits
        is_last = end == request.num_tokens
        return cls(
            request, start, end, is_last,
            needs_logits=is_last and not request.takes_the_best,
            wants_all_logits=first is not None and end > first,
            spans=[s for s in request.spans if s.start < end and start < s.end],
        )  # fmt: skip

    @property
    def is_running(self) -> bool:
        """Whether its request has not ended since it was scheduled."""
        return self.request.status is RequestStatus.RUNNING


@dataclass(frozen=True)
class Step:
    """Page copies (source, destination), in order; then prefill calls; then decode calls."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    prefills: list[list[Chunk]] = field(default_factory=list)
    decodes: list[list[Chunk]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)
