"""What the extra `compile` installs: whether it is there, and a call of iree-compile."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

from compile.target import Target
from sf_local.errors import CompileError

EXTRA = ("iree.compiler", "gguf", "safetensors", "huggingface_hub", "rich")


def check_installed() -> None:
    """Raise CompileError unless every package of the extra `compile` is installed."""
    for name in EXTRA:
        try:
            found = find_spec(name)
        except ModuleNotFoundError:  # of the package `iree` around it
            found = None
        if found is None:
            raise CompileError(
                f"compiling needs the package {name}, which is not installed; "
                'run: pip install "sf-local[compile]"'
            )


def iree_compile(mlir: Path, vmfb: Path, target: Target, *flags: str) -> None:
    """Compile the module in the file `mlir` for `target` to the file `vmfb`.

    flags: further arguments of iree-compile. Raises CompileError.
    """
    check_installed()
    from iree.compiler.tools.binaries import find_tool

    command = [find_tool("iree-compile"), str(mlir), *target.flags, *flags, "-o", str(vmfb)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not vmfb.exists():
        raise CompileError(
            f"iree-compile failed for {target.name} (exit {done.returncode}): "
            f"{done.stderr.strip()[:2000]}"
        )
