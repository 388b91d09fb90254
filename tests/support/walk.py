"""Random texts of grammars, written token by token."""

from __future__ import annotations

import functools

import numpy as np

from sf_local.grammar.matcher import Grammar
from sf_local.text.tokenizer import Tokenizer

EOS = 2
CLOSING = [b'"', b"]", b"}", b","]


def allowed(grammar: Grammar) -> list[int]:
    mask = np.full(grammar.num_words, -1, np.int32)
    grammar.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


class Walk:
    """A generation by a model that chooses at random, with some will to finish."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammar: Grammar,
        seed: int,
        jump: bool = False,
        limit: int = 400,
    ) -> None:
        self.ids: list[int] = []
        self.num_steps = 0
        self._random = np.random.default_rng(seed)
        while not grammar.is_complete and len(self.ids) < limit:
            if jump:
                self.ids += grammar.forced()
            if not grammar.is_complete:
                self.ids.append(self._choose(tokenizer, allowed(grammar)))
                grammar.accept(self.ids[-1])
                self.num_steps += 1
        self.is_complete = grammar.is_complete
        text = b"".join(map(tokenizer.token_bytes, self.ids))
        self.text = text.decode(errors="strict" if self.is_complete else "replace")

    def _choose(self, tokenizer: Tokenizer, ids: list[int]) -> int:
        last = [i for i in ids if i == EOS or tokenizer.token_bytes(i)[:1] in CLOSING]
        return int(self._random.choice(last if last and self._random.random() < 0.4 else ids))


def accepts(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether `text`, byte for byte, and then the end fit `grammar`."""
    for byte in text.encode():
        token = _byte_tokens(tokenizer)[byte]
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return grammar.is_complete or grammar.allows(EOS)


@functools.lru_cache(maxsize=2)
def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    pieces = {i: tokenizer.token_bytes(i) for i in reversed(range(tokenizer.vocab_size))}
    return {piece[0]: i for i, piece in pieces.items() if len(piece) == 1}
