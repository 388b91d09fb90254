"""Requests whose grammars take long take turns, so that the others wait for few of them a step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import chain

from sf_local.engine.generation import Generation
from sf_local.request.batch import Step
from sf_local.request.request import Request

MAX_SECONDS = 0.25  # of CPU time for all grammars of a step, or for one that takes longer alone


def in_turn(step: Step, generations: Mapping[Request, Generation]) -> Step:
    """A step without the requests whose turn it is not; they are scheduled again.

    What grammars will take is guessed by what they took when they were last in a step. Those that
    were left out longest come first.
    """
    requests = [chunk.request for chunk in chain(*step.prefills, *step.decodes)]
    pairs = [(generations[request].grammar, request) for request in requests]
    constrained = [(grammar, request) for grammar, request in pairs if grammar is not None]
    passed, total = set(), 0.0
    for grammar, request in sorted(constrained, key=lambda pair: pair[0].stepped_at):
        if total and total + grammar.seconds > MAX_SECONDS:
            passed.add(request)
        else:
            total += grammar.seconds
            grammar.seconds, grammar.stepped_at = 0.0, time.perf_counter()
    if not passed:
        return step
    prefills, decodes = (
        [[chunk for chunk in call if chunk.request not in passed] for call in calls]
        for calls in (step.prefills, step.decodes)
    )
    return Step(step.copies, prefills, decodes)
