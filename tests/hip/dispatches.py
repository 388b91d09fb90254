"""What dispatches write, as the compiler tells, and whether their machine code writes the same.

A dispatch is one kernel: iree-compile cuts a model into about twenty a layer. It dumps each as
MLIR before it makes code of it; there stand the types of what a dispatch writes, and its
arithmetic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# How far two results may be apart, as a share of the largest value that the dispatch writes.
BOUNDS = {"f32": 1e-5, "f16": 5e-3, "bf16": 2e-2}
DTYPES: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16,
    "i1": np.int8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
}  # fmt: skip
ROUNDING = {"arith.addf", "arith.divf", "arith.mulf", "arith.subf", "arith.truncf",
            "iree_linalg_ext.attention"}  # fmt: skip
EXACT = {
    "arith.addi", "arith.andi", "arith.cmpf", "arith.cmpi", "arith.constant", "arith.divsi",
    "arith.divui", "arith.extf", "arith.extsi", "arith.extui", "arith.index_cast",
    "arith.index_castui", "arith.maximumf", "arith.maxsi", "arith.maxui", "arith.minsi",
    "arith.minui", "arith.muli", "arith.ori", "arith.remsi", "arith.remui", "arith.select",
    "arith.shli", "arith.sitofp", "arith.subi", "arith.trunci", "iree_linalg_ext.yield",
    "linalg.fill", "linalg.generic", "linalg.index", "linalg.yield", "tensor.cast",
    "tensor.collapse_shape", "tensor.empty", "tensor.expand_shape", "tensor.extract",
    "tensor.extract_slice", "tensor.insert_slice",
}  # fmt: skip

_NAME = re.compile(r"hal\.executable\.export public @(\S+) ordinal")
_WRITTEN = re.compile(r"dispatch\.tensor<(?:writeonly|readwrite):tensor<(?:[\d?]+x)*(\w+)>")
_OURS = re.compile(r'precision = "(\w*)".*written = "([\w,]+)"')
_OPERATION = re.compile(r"(?<![.\w])((?:arith|math|linalg|iree_linalg_ext|tensor)\.[a-z_]+)\b")
_TRUNCATED = re.compile(r"arith\.truncf .* to (\w+)")
_ATTENTION = re.compile(r"iree_linalg_ext\.attention .*?ins\((.*?)\) outs", re.DOTALL)
_FLOATS = re.compile(r"(?<![a-z])(b?f\d+)>")


@dataclass(frozen=True)
class Dispatch:
    """One dispatch.

    dtype: of the elements that it writes; "i8", bytes, if it writes several types. A kernel of our
    own may tell that of each of its last bindings instead, as in "f16,f32". precision: the float
    type whose bound it must keep; None where it rounds nothing, so that its results must be the
    same to the bit.
    """

    name: str
    dtype: str
    precision: str | None

    def dtype_of(self, bindings: Sequence[int]) -> str:
        """Of what it writes to an allocation with these of its bindings, of which -1 is the last.

        Raises ValueError where bindings of several types lie in one allocation.
        """
        types = self.dtype.split(",")
        if len(types) == 1:
            return types[0]
        found = {types[number] for number in bindings if number >= -len(types)}
        if len(found) != 1:
            raise ValueError(f"{self.name} writes {found} to one allocation, or to an input")
        return found.pop()


def read_dispatches(folder: Path) -> dict[str, Dispatch]:
    """All dispatches of a model by name, from iree-compile's --iree-hal-dump-executable-sources-to.

    Raises ValueError for one that this module cannot judge.
    """
    found = [_read_dispatch(path.read_text()) for path in sorted(folder.glob("*.mlir"))]
    return {dispatch.name: dispatch for dispatch in found}


def _read_dispatch(text: str) -> Dispatch:
    [name], written = _NAME.findall(text), set(_WRITTEN.findall(text))
    if ours := _OURS.search(text):
        return Dispatch(name, ours[2], ours[1] or None)
    operations = set(_OPERATION.findall(text))
    roundings = {o for o in operations if o in ROUNDING or o.startswith("math.")}
    if unknown := operations - roundings - EXACT:
        raise ValueError(f"{name}: is it exact, what {sorted(unknown)} do?")
    if not roundings:
        return Dispatch(name, written.pop() if len(written) == 1 else "i8", None)
    if len(written) != 1:  # by which of them would its bytes be judged?
        raise ValueError(f"{name} rounds, and writes elements of {sorted(written)}")
    types = {*written, *_TRUNCATED.findall(text)}
    for operands in _ATTENTION.findall(text):  # weights of its sum are rounded to the values' type
        types |= set(_FLOATS.findall(operands))
    return Dispatch(name, written.pop(), max(types & set(BOUNDS), key=BOUNDS.__getitem__))


@dataclass(frozen=True)
class Written:
    """What one launch left in one allocation, around all that it changed there."""

    kernel: str
    launch: int
    bindings: Sequence[int]  # of the launch, in this allocation
    before: bytes
    twin: bytes
    machine: bytes


def read_record(path: Path) -> Iterator[Written]:
    """The entries of the file that the driver writes when it runs both, as compare.h says."""
    with path.open("rb") as file:
        while line := file.readline():
            entry = json.loads(line)
            before, twin, machine = (file.read(entry["size"]) for _ in range(3))
            yield Written(
                entry["kernel"], entry["launch"], entry["bindings"], before, twin, machine
            )


@dataclass
class Difference:
    """Of all launches of one dispatch, the largest between its twin and its machine code, as a
    share of the largest value that the launch wrote."""

    dispatch: Dispatch
    launches: int = 0
    largest: float = 0.0
    problem: str = ""  # what else is wrong, first

    @property
    def is_wrong(self) -> bool:
        bound = BOUNDS[self.dispatch.precision] if self.dispatch.precision else 0.0
        return bool(self.problem) or not self.largest <= bound

    def __str__(self) -> str:
        text = f"{self.dispatch.name}: {self.largest:.1e} of the largest {self.dispatch.dtype}"
        return f"{text}, {self.problem}" if self.problem else text

    def add(self, written: Written) -> None:
        self.launches += 1
        dtype = self.dispatch.dtype_of(written.bindings)
        arrays = (_elements(data, dtype)
                  for data in (written.before, written.twin, written.machine))  # fmt: skip
        difference, problem = _difference(*arrays, is_exact=self.dispatch.precision is None)
        self.largest = max(self.largest, difference)
        if problem and not self.problem:
            self.problem = f"in launch {written.launch} {problem}"


def _elements(data: bytes, dtype: str) -> NDArray[Any]:
    return np.frombuffer(data, DTYPES[dtype])


def _difference(
    before: NDArray[Any], twin: NDArray[Any], machine: NDArray[Any], *, is_exact: bool
) -> tuple[float, str]:
    """The largest difference as a share of the largest value, and what else is wrong.

    What is not finite must be the same to the bit, as must everything where nothing is rounded.
    Memory that was never written holds NaN: who leaves some of it unwritten shows here.
    """
    as_bits = f"u{before.itemsize}"
    bits = [array.view(as_bits) for array in (before, twin, machine)]
    differs = bits[1] != bits[2]
    if not differs.any():
        return 0.0, ""
    if is_exact:
        return 0.0, _first("is not the same to the bit", differs, twin, machine)
    changed = (bits[0] != bits[1]) | (bits[0] != bits[2])
    wide = [array[changed].astype(np.float64) for array in (twin, machine)]
    finite = np.isfinite(wide[0]) & np.isfinite(wide[1])
    if (differs[changed] & ~finite).any():
        whole = differs.copy()
        whole[changed] &= ~finite
        return 0.0, _first("one is not finite", whole, twin, machine)
    largest = float(np.abs(wide[0][finite]).max())
    apart = float(np.abs(wide[0] - wide[1])[finite].max())
    return (apart / largest if largest else np.inf), ""


def _first(what: str, which: NDArray[np.bool_], twin: NDArray[Any], machine: NDArray[Any]) -> str:
    where = int(np.flatnonzero(which)[0])
    count = int(which.sum())
    return f"{what}: {count} elements, the first {twin[where]} in the twin and {machine[where]}"


def compare_record(path: Path, dispatches: Mapping[str, Dispatch]) -> dict[str, Difference]:
    """How each dispatch did, of those that changed anything."""
    differences: dict[str, Difference] = {}
    for written in read_record(path):
        dispatch = dispatches[written.kernel]
        differences.setdefault(dispatch.name, Difference(dispatch)).add(written)
    return differences


def wrong_ones(differences: Iterable[Difference]) -> list[str]:
    """What is wrong, a line a dispatch; for a test, which wants an empty list."""
    return [str(difference) for difference in differences if difference.is_wrong]


def worst(differences: Collection[Difference]) -> dict[str, float]:
    """The largest difference by float type."""
    by_type: dict[str, float] = {}
    for difference in differences:
        if (precision := difference.dispatch.precision) is not None:
            by_type[precision] = max(by_type.get(precision, 0.0), difference.largest)
    return by_type
