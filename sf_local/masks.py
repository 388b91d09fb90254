"""Masks: what the grammars of one call's rows allow next, computed while the device runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from sf_local.errors import GrammarError
from sf_local.grammar import Grammar
from sf_local.sampler import Mask


class Masks:
    """One row for each row of the call; None where there is no grammar.

    errors: what a grammar gave up with, by row; the other rows are not concerned.
    """

    def __init__(self, grammars: Sequence[Grammar | None]) -> None:
        self._grammars = grammars
        self.rows: list[Mask | None] = [None] * len(grammars)
        self.errors: dict[int, Exception] = {}
        self.seconds = 0.0

    def fill(self) -> None:
        """Compute all masks; to be called once."""
        if not any(self._grammars):
            return
        started_at = time.thread_time()  # it runs beside the device
        for i, grammar in enumerate(self._grammars):
            if grammar is not None:
                self.rows[i] = mask = np.empty(grammar.num_words, np.int32)
                try:
                    grammar.fill_mask(mask)
                    if not mask.any():
                        raise GrammarError("the grammar came to a point where nothing may follow")
                except Exception as error:
                    self.errors[i] = error
        self.seconds = time.thread_time() - started_at
