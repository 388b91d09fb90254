"""What `sf-local trace` runs: one small batch, on an engine that writes a trace."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from sf_local.engine.engine import Engine
from sf_local.errors import RequestError
from sf_local.request.params import SamplingParams

SHORT = [
    "The capital of France is", "Water boils at", "The largest ocean is", "A haiku about rain:",
]  # fmt: skip
SENTENCE = "The ferry leaves the harbour at nine, and the lighthouse keeper waves to its captain. "
QUESTIONS = ["When does the ferry leave?", "Who waves to the captain?", "Where is the keeper?"]
LONG = 700  # tokens of a long prompt, or a half of the context
CITY = """{
  "type": "object",
  "properties": {
    "city": {"type": "string", "maxLength": 20},
    "country": {"type": "string", "maxLength": 20}
  },
  "required": ["city", "country"],
  "additionalProperties": false
}"""


def run(engine: Engine, prompts: list[str] | None, max_new_tokens: int) -> int:
    """Answer all prompts at once; returns their number.

    Without prompts, it is a mix that shows what there is to see: short ones, long ones that begin
    with the same text, and one whose answer follows a schema. Raises what `Engine.generate` does.
    """
    if prompts is not None:
        return len(engine.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens)))
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0, ignore_eos=True)
    length = min(LONG, engine.max_tokens // 2)
    story = (engine.encode(SENTENCE) * length)[:length]
    mix = [engine.encode(text) for text in SHORT]
    mix += [story + engine.encode(question) for question in QUESTIONS]
    city = replace(params, json_schema=CITY, ignore_eos=False)
    every = [*mix, engine.encode("A city as JSON: ")]
    return len(engine.generate(every, [*[params] * len(mix), city]))


def summary(file: Path) -> str:
    """Where the time of a closed trace's steps went, a line a part, the longest first.

    Raises RequestError if the trace ended before its engine did.
    """
    try:
        events = json.loads(file.read_text())
    except ValueError as error:
        raise RequestError(
            f"trace={str(file)!r} is not whole, as its disk is full; what is there can be opened"
        ) from error
    slices = [event for event in events if event["ph"] == "X" and event["cat"] == "step"]
    parts: Counter[str] = Counter()
    for event in slices:
        parts[event["name"]] += event["dur"]
    total = sum(parts.values())
    lines = [f"{'part of a step':14} {'ms':>9} {'share':>6}"]
    lines += [f"{name:14} {us / 1e3:9.1f} {us / total:6.1%}" for name, us in parts.most_common()]
    return "\n".join(lines)
