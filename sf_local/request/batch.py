"""What one step of the scheduler computes: chunks of requests, and the rows of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sf_local.request.prompt import Span
from sf_local.request.request import Request


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one sequence at positions start .. end - 1, as the model gets them.

    page_ids: KV pages of positions 0 .. end - 1. spans: where tiles of images, which have
    embeddings, take the place of tokens.
    """

    tokens: Sequence[int]
    start: int
    page_ids: Sequence[int]
    spans: Sequence[Span] = ()

    @property
    def end(self) -> int:
        """The position behind the last token, which is the length of the sequence so far."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start .. end - 1 of one request, computed in one call.

    The scheduler decides all of it once, and everyone else reads it.

    Attributes:
        is_last: nothing is left behind it, so the next token is sampled after it.
        needs_logits: sampling needs the logits after its last token; else the likeliest token that
            the model reports is enough.
        is_decode: it is one token for a decode call; else it goes to a prefill call.
        wants_all_logits: log probabilities of the prompt need the logits of its other tokens, too.
        spans: tiles of images of which it shows something.
    """

    request: Request
    start: int
    end: int
    is_last: bool
    needs_logits: bool
    is_decode: bool = False
    wants_all_logits: bool = False
    spans: Sequence[Span] = ()


@dataclass(frozen=True)
class Step:
    """Page copies (source, destination), in order; then prefill calls; then decode calls."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    prefills: list[list[Chunk]] = field(default_factory=list)
    decodes: list[list[Chunk]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)
