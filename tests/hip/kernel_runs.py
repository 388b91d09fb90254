"""A kernel of our own by itself: its machine code beside its plain form, in a child process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.build import VMFB
from compile.mlir.builder import Builder, Tensor
from compile.target import Target
from tests.hip.dispatches import compare_record, read_dispatches, wrong_ones
from tests.hip.driver import Driver, compile_code_object, compile_twins

Array = NDArray[Any]

RUN = """
    import sys

    import iree.runtime
    import numpy as np

    vmfb, given, found = sys.argv[1:4]
    with open(vmfb, "rb") as file:
        module = iree.runtime.load_vm_flatbuffer(file.read(), driver="hip")
    with np.load(given) as arrays:
        results = module["main"](*arrays.values())
    results = results if isinstance(results, (tuple, list)) else [results]
    np.savez(found, *(result.to_host() for result in results))
"""


@dataclass(frozen=True)
class KernelRunner:
    """Runs modules with one kernel on one chip. folder: for what is written meanwhile."""

    driver: Driver
    cache: Path
    folder: Path
    chip: str

    def run(
        self, name: str, text: Callable[[Target], str], arguments: Sequence[Array],
        order: str = "random",
    ) -> Array:  # fmt: skip
        """What the machine code of a module's only kernel gives, as its plain form does.

        text: of the module for a target, whose function is `main`. order: of the waves.
        """
        [result] = self.run_all({name}, text, arguments, order)
        return result

    def run_all(
        self, names: set[str], text: Callable[[Target], str], arguments: Sequence[Array],
        order: str = "random",
    ) -> list[Array]:  # fmt: skip
        """The same of a module with several kernels, or results."""
        code, plain, given, record = (self.folder / name for name in ("a", "b", "c.npz", "d"))
        code.write_text(text(Target(self.chip)))
        plain.write_text(text(Target("cpu")))
        np.savez(given, *arguments)
        record.unlink(missing_ok=True)  # that of a product before
        vmfb = compile_code_object(code, self.chip, self.cache).parent / VMFB
        twins, found = compile_twins(plain, self.cache), self.folder / "found.npz"
        outcome = self.driver.run(
            RUN, vmfb, given, found, devices=f"{self.chip}:64MiB", twins=twins, runs="both",
            machine=order, record=record,
        )  # fmt: skip
        assert outcome.exit_code == 0, outcome.stderr
        differences = compare_record(record, read_dispatches(twins))
        assert set(differences) == names and wrong_ones(differences.values()) == []
        with np.load(found) as results:
            return list(results.values())


def bitcast(b: Builder, x: Tensor, dtype: str) -> Tensor:
    """The same bits as another type: the runtime takes bf16 as i16."""
    if x.dtype == dtype:
        return x
    result = replace(x, dtype=dtype)
    sizes = ", ".join(size for size in x.shape if isinstance(size, str))
    sizes = f"{{{sizes}}}" if sizes else ""
    return b.tensor(
        f"flow.tensor.bitcast {x.name} : {x.type}{sizes} -> {result.type}{sizes}", x.shape, dtype
    )
