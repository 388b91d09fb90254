"""The stand-in for AMD's driver: built here, and loaded into child processes.

A process has one driver, which reads its settings when it is loaded, and a device that fails may
end the process: so whatever uses it runs in a child. There `control.py` sets it up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compile.target import resolve_target
from sf_local.artifact.manifest import COMPILER_VERSION, VMFB
from tests.support.compile_once import made_once

HERE = Path(__file__).parent
LIBRARY = "libamdhip64.so"
# Floats as the sources have them: no fused products, but no care for errno and traps either.
COMPILER = ("g++", "-std=c++20", "-O2", "-ftree-vectorize", "-march=x86-64-v3",
            "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra",
            "-Werror", "-fvisibility=hidden", "-fPIC", "-pthread")  # fmt: skip
TABLES = "tables.inc"  # of encodings; isa/tables.py writes it
TWIN_FLAGS = (*resolve_target("cpu").flags, "--iree-llvmcpu-disable-distribution")
DEFAULT_DEVICES = "gfx1100:512MiB"  # real sizes would be taken from this machine's memory


@dataclass(frozen=True)
class Call:
    """A call of the driver: what it returned, when it began, and what else the log says of it.

    device: the one that the calling thread worked with.
    """

    function: str
    result: str
    at: float
    device: int
    notes: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a child process ended, and what it called."""

    exit_code: int  # minus the signal that ended it
    stdout: str
    stderr: str
    calls: Sequence[Call]

    @property
    def value(self) -> Any:
        """What the last line of its output says in JSON; the child must have ended well."""
        assert self.exit_code == 0, f"exit code {self.exit_code}\n{self.stdout}\n{self.stderr}"
        return json.loads(self.stdout.splitlines()[-1])

    def after(self, mark: str) -> list[Call]:
        """The calls from a mark to the next one."""
        names = [call.notes["name"] if call.function == "mark" else None for call in self.calls]
        start = names.index(mark) + 1
        return list(self.calls[start : next(i for i in range(start, len(names)) if names[i])])

    def of(self, function: str) -> list[Call]:
        return [call for call in self.calls if call.function == function]


@dataclass(frozen=True)
class Driver:
    """A built stand-in. num_interpreted: dispatches of machine code, of all children so far."""

    folder: Path
    num_interpreted: ClassVar[int] = 0

    def run(
        self,
        code: str,
        *arguments: object,
        devices: str = DEFAULT_DEVICES,
        twins: Path | None = None,
        fail: str = "",
        delay_us: int = 20,
        runs: str = "twin",
        machine: str = "",
        record: Path | None = None,
        timeout: float = 300,
        **environment: str,
    ) -> Outcome:
        """Run Python code in a child process; `arguments` are its sys.argv[1:].

        devices: chips with the sizes of their memory. twins: the folder that `compile_twins` made.
        fail: "function:n:error" or "function:n:error:async", as record.h says. delay_us: how long
        a stream waits before each piece of work. runs: "twin", "machine" or "both", which a launch
        runs. machine: words for the interpreter of machine code, as kernel.cpp lists them. record:
        the file that "both" writes its results to, as compare.h says. Raises TimeoutExpired.
        """
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "calls.jsonl"
            settings = {
                "IREE_HIP_DYLIB_PATH": str(self.folder),
                "PYTHONPATH": os.pathsep.join(paths),
                "SF_HIP_DELAY_US": str(delay_us),
                "SF_HIP_DEVICES": devices,
                "SF_HIP_FAIL": fail,
                "SF_HIP_LOG": str(log),
                "SF_HIP_MACHINE": machine,
                "SF_HIP_RECORD": str(record or ""),
                "SF_HIP_RUN": runs,
                "SF_HIP_TWINS": str(twins or ""),
            }
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
                env=os.environ | settings | environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            calls = [_call(line) for line in log.read_text().splitlines()] if log.exists() else []
        outcome = Outcome(done.returncode, done.stdout, done.stderr, calls)
        Driver.num_interpreted += len(outcome.of("interpret"))
        return outcome


def build_driver(cache: Path) -> Driver | None:
    """Build the driver, or take it from `cache`; None where there is no g++."""
    if shutil.which(COMPILER[0]) is None:
        return None
    files = [*HERE.glob("*.cpp"), *HERE.glob("*.h"), *HERE.glob("isa/*")]
    text = b"".join(path.read_bytes() for path in sorted(files) if path.is_file())
    return Driver(made_once(cache / "driver", repr(COMPILER).encode() + text, _compile))


def _compile(folder: Path) -> None:
    """Build the library in an empty folder, two files at a time."""
    subprocess.run([sys.executable, HERE / "isa" / "tables.py", folder / TABLES], check=True)

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        include = (f"-I{HERE}", f"-I{HERE / 'isa'}", f"-I{folder}")
        subprocess.run([*COMPILER, *include, "-c", source, "-o", target], check=True)
        return str(target)

    # The largest first, so that no processor is left with one at the end.
    sources = [*HERE.glob("*.cpp"), *HERE.glob("isa/*.cpp")]
    sources.sort(key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*COMPILER, "-shared", *objects, "-o", folder / LIBRARY], check=True)
    for path in objects:
        os.remove(path)


def compile_twins(mlir: Path, cache: Path) -> Path:
    """A folder with the CPU twins of all kernels of a model's MLIR, and the MLIR of each kernel."""
    return _compiled(mlir, TWIN_FLAGS, ("binaries", "sources"), cache / "twins")


def compile_code_object(mlir: Path, chip: str, cache: Path) -> Path:
    """The machine code of all kernels of a module for one chip: an .hsaco file.

    Beside it lie the same as the compiler writes it for an assembler (.rocmasm), and the module
    itself (VMFB).
    """
    dumps = ("binaries", "intermediates")
    [code] = _compiled(mlir, resolve_target(chip).flags, dumps, cache / "code").glob("*.hsaco")
    return code


def _compiled(mlir: Path, flags: Sequence[str], dumps: Sequence[str], cache: Path) -> Path:
    """A folder with the module that iree-compile makes of `mlir`, and what it dumps."""
    from iree.compiler.tools.binaries import find_tool

    def make(folder: Path) -> None:
        dumping = [f"--iree-hal-dump-executable-{what}-to={folder}" for what in dumps]
        command = [find_tool("iree-compile"), str(mlir), *flags, *dumping, "-o", folder / VMFB]
        subprocess.run(command, check=True)

    return made_once(
        cache, f"{COMPILER_VERSION} {flags} {dumps}".encode() + mlir.read_bytes(), make
    )


def _call(line: str) -> Call:
    notes = json.loads(line)
    fixed = {name: notes.pop(name) for name in ("function", "result", "at", "device")}
    return Call(**fixed, notes=notes)
