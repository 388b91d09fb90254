"""What the extra `compile` installs: whether it is there, and a call of iree-compile."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

from compile.target import Target
from sf_local.artifact.manifest import COMPILER_VERSION
from sf_local.errors import CompileError

EXTRA = ("iree.compiler", "gguf", "safetensors", "huggingface_hub", "rich")
REINSTALL = (
    f"install it again: pip install --force-reinstall iree-base-compiler=={COMPILER_VERSION}"
)


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
    done = _run(_compiler(), str(mlir), *target.flags, *flags, "-o", str(vmfb))
    if done.returncode == -signal.SIGKILL:
        raise CompileError(
            f"iree-compile was killed while it compiled for {target.name}; if the machine or its "
            "container has run out of memory, give it more, or compile where there is more"
        )
    if done.returncode or not vmfb.exists():
        told = done.stderr.strip().replace(f"{mlir.parent}{os.sep}", "")  # which may be temporary
        raise CompileError(
            f"iree-compile failed for {target.name} (exit {done.returncode}): {told[:2000]}"
        )


def _compiler() -> str:
    """The path of iree-compile, also of one that must not be executed."""
    import iree.compiler
    from iree.compiler.tools.binaries import find_tool

    try:
        return str(find_tool("iree-compile"))
    except ValueError as error:  # for want of permission, too
        given = os.environ.get("IREE_TOOL_PATH", "").split(os.pathsep)
        folders = [*filter(None, given), *(f"{p}/_mlir_libs" for p in iree.compiler.__path__)]
        paths = [path for folder in folders if (path := Path(folder, "iree-compile")).is_file()]
        if not paths:
            raise CompileError(f"iree-compile is missing; {REINSTALL}") from error
        return str(paths[0])


def _run(compiler: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [compiler, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        remedy = REINSTALL
        if isinstance(error, PermissionError):
            chmod = shlex.join(["chmod", "+x", compiler])
            remedy = f"allow it ({chmod}; its file system must not be mounted noexec), or {remedy}"
        raise CompileError(f"{compiler} cannot be executed ({error.strerror}); {remedy}") from error
