"""Programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys

# A beginning of programs, for which sglang is not installed
WITHOUT_SGLANG = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sglang":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


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
