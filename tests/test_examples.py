"""Every example runs with no arguments, on the real demo model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multi_turn.py", r"Paris[\s\S]*first token after \d+ ms, then \d+ tokens/s"),
        ("streaming.py", r"(?i)\bsea\b"),
        ("fork.py", r"Tip 1: \s*\w[\s\S]*Tip 2: \s*\w[\s\S]*In summary,"),
        ("batch.py", r"France: .*Paris"),
        ("constrained.py", r"Europe (True|False) name='.*' country='.*' continent='\w+'\n Asia"),
        ("offline_batch.py", r"The largest ocean is.*Pacific"),
    ],
)
def test_example(smollm2: Path, name: str, expected: str) -> None:
    assert re.search(expected, run(name))
    if name != "offline_batch.py":
        assert re.search(expected, run(name, "--vmfb", str(smollm2), "--device", "cpu"))


def test_there_is_no_other_example() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "common.py", "multi_turn.py", "streaming.py", "fork.py", "batch.py", "constrained.py",
        "offline_batch.py", "bench_peers.py", "bench_shape.py", "first_run_on_gpu.py",
    }  # fmt: skip
