"""TODO."""

from __future__ import annotations

import subprocess
from pathlib import Path

from compile.target import Target
from sf_local.errors import CompileError


def iree_compile(mlir: Path, vmfb: Path, target: Target, *flags: str) -> None:
    try:
        from iree.compiler.tools.binaries import find_tool
    except ImportError as error:
        raise CompileError(
            'the compiler is not installed; run: pip install "sf-local[compile]"'
        ) from error
    command = [find_tool("iree-compile"), str(mlir), *target.flags, *flags, "-o", str(vmfb)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not vmfb.exists():
        raise CompileError(
            f"iree-compile failed for {target.name} (exit {done.returncode}): "
            f"{done.stderr.strip()[:2000]}"
        )
