"""Programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys


def run_program(program: str, *arguments: object, timeout: float = 100) -> str:
    """What a Python program prints, which must end well and write no errors.

    It finds `arguments` in sys.argv.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr or done.returncode
    return done.stdout
