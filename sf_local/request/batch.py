"""What a scheduler decides for one step: chunks of requests, and the rows they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sf_local.request.prompt import Span
from sf_local.request.request import Request, RequestStatus


@dataclass(frozen=True)
class Row:
    """One row of a model call: tokens of a sequence from position `start` on, and all its pages.

    spans: where embeddings of image tiles take the place of tokens; positions of the sequence.
    """

    tokens: Sequence[int]
    start: int
    page_ids: Sequence[int]
    spans: Sequence[Span] = ()

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one request, to be computed in one call.

    is_last: whether the next token is sampled after it. needs_logits: whether the logits of its
    last token are needed for that; otherwise the best token is enough. wants_all_logits: whether
    the logits of its other tokens are wanted, too. spans: image tiles that overlap it.
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
        """The tokens of a request that are not computed yet, up to `end`."""
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
        """Whether its request still runs: it may have ended since it was scheduled."""
        return self.request.status is RequestStatus.RUNNING


@dataclass(frozen=True)
class Step:
    """The work of one step: page copies (source, destination), then prefills, then decodes.

    Each inner list of chunks is one call. False if there are no calls.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    prefills: list[list[Chunk]] = field(default_factory=list)
    decodes: list[list[Chunk]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)
