"""What a failed GPU must leave: who hears of it, and in which words."""

from __future__ import annotations

from tests.hip.driver import Call, Outcome


def between(copies: list[Call], source: str, to: str) -> list[Call]:
    return [c for c in copies if (c.notes["from"], c.notes["to"]) == (source, to)]


LOST = "it is lost to this process: start the program again"


def check_failure(outcome: Outcome, message: str, cpu_answer: list[list[int]]) -> None:
    """Everyone hears why in a few words, the CPU is as it was, and the process ends well."""
    errors, tokens = outcome.value
    assert errors and tokens == cpu_answer[0]
    assert outcome.stderr == ""
    for kind, text in errors:
        assert kind == "DeviceError"
        assert message in text and "device='cpu'" in text
        assert "\n" not in text and "iree" not in text and len(text) < 600
