"""PhaseTable: numbers the phases of a kernel by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compile.cpu.kernel import CACHE_LINE, PHASE_COUNTERS, KernelBuilder
from compile.mlir.values import Scalar

MAX_AFTER = 5  # phases after the layers; the phase "exit" is the next number behind them


@dataclass(frozen=True)
class Phases:
    """Numbers of phases, as indices of the kernel: `phases[name]`."""

    first: Scalar
    offsets: Mapping[str, int]  # from `first`

    def __getitem__(self, name: str) -> Scalar:
        offset = self.offsets[name]
        return self.first + offset if offset else self.first


class PhaseTable:
    """Phases of a kernel in order: those before its layers, of each layer, after them, and "exit".

    Every phase has counters of its own. A phase that a kernel leaves out leaves its counters zero.
    """

    def __init__(
        self, before: Sequence[str], layer: Sequence[str], after: Sequence[str], num_layers: int
    ) -> None:
        assert len(after) <= MAX_AFTER
        self._before, self._layer, self._after = before, layer, after
        self._first_after = len(before) + len(layer) * num_layers
        self._exit = self._first_after + MAX_AFTER

    @property
    def num_counters(self) -> int:
        """Elements of the i32 counters, all zero when the kernel starts."""
        return (self._exit + 1) * PHASE_COUNTERS

    @property
    def exit_counter(self) -> int:
        """The index of the counter that is 1 when the phase "exit" is done."""
        return self._exit * PHASE_COUNTERS + CACHE_LINE

    def before(self, k: KernelBuilder) -> Phases:
        """The phases before the layers, and "exit"."""
        return Phases(k.scalar(0, "index"), {**_offsets(self._before), "exit": self._exit})

    def layer(self, layer: Scalar) -> Phases:
        """The phases of a layer, whose number the kernel knows."""
        return Phases(layer * len(self._layer) + len(self._before), _offsets(self._layer))

    def after(self, k: KernelBuilder) -> Phases:
        """The phases after the layers."""
        return Phases(k.scalar(self._first_after, "index"), _offsets(self._after))


def _offsets(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}
