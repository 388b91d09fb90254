"""What the sampler needs of logits, on GPUs, by two kernels of our own.

Shapes: N rows of logits [N, V] f32, in blocks of 256; the last may have fewer, and is judged as if
it were filled up with MASKED. The sampler rarely needs all V logits on the host: a summary
[N, 1 + 2 * blocks] f32 has the first of a row's likeliest tokens, then each block's maximum, then
each block's sum of exp((logit - maximum) * inv_temperature).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from compile.formats.layout import MASKED
from compile.gpu.kernel import THREADS, Kernel, Kernels, ThreadBuilder
from compile.mlir.builder import Tensor
from compile.mlir.executable import ExecutableBuilder, Memory
from compile.mlir.values import Scalar
from sf_local.artifact.manifest import LOGITS_BLOCK

LANES = 32  # threads of a block of logits
LOWEST = -3e38  # below every maximum, which are MASKED at least


@dataclass(frozen=True)
class SummarizeBlocks(Kernel):
    """The maximum of each block, its sum of exponentials, and the place of its first maximum.

    Bindings: logits [N, V], inverse temperatures [N], the summary, of which its first entries are
    left out; places in blocks [N, blocks]; all f32. Constant: N. Workgroups: blocks / 8, N.
    """

    size: int  # V

    @property
    def name(self) -> str:
        """By its size."""
        return f"summarize_{self.size}"

    @property
    def result(self) -> tuple[str, str]:
        """All f32."""
        return "f32", "f32"

    @property
    def num_blocks(self) -> int:
        """Of a row."""
        return _num_blocks(self.size)

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does: a 32nd of a block."""
        block = k.workgroup() * (THREADS // LANES) + k.thread() // LANES
        row, lane, piece = k.workgroup(1), k.thread() % LANES, math.gcd(self.size, 4)
        logits, scales, summary, places, _ = self._arguments(k)
        end, none = k.scalar(self.size, "index"), k.scalar(LOGITS_BLOCK - 1, "f32")
        values: list[tuple[Scalar, Scalar]] = []  # and where each is in the block
        for first in range(0, LOGITS_BLOCK, LANES * piece):
            place = lane * piece + first
            position = block * LOGITS_BLOCK + place
            at = row * self.size + position.minimum(self.size - piece)
            loaded = logits.load_vector(at, piece)
            loaded = position.less(end).select(loaded, k.scalar(MASKED, loaded.dtype))
            values += [(k.element(loaded, i), place + i) for i in range(piece)]
        top = k.scalar(MASKED, "f32")
        for value, _ in values:
            top = top.maximum(value)
        top = k.reduce("maximumf", top, LANES)
        total, where, scale = k.scalar(0.0, "f32"), none, scales.load(row)
        for value, place in values:
            total = total + ((value - top) * scale).math("exp")
            number = place.to("i32").to("f32")
            where = _smaller(k, where, value.is_below(top).select(none, number))
        total, where = k.reduce("add", total, LANES), k.reduce("minnumf", where, LANES)
        is_there = block.less(k.scalar(self.num_blocks, "index"))
        with k.when(k.bits("andi", is_there, lane.equals(0))):
            self._store(summary, places, row, block, (top, total, where))

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Block by block."""
        logits, scales, summary, places, num_rows = self._arguments(k)
        end, none = k.scalar(self.size, "index"), k.scalar(LOGITS_BLOCK - 1, "f32")

        def over(
            row: Scalar, block: Scalar, first: Scalar, body: Callable[..., Scalar]
        ) -> Scalar:  # fmt: skip
            """body(value, place, what there is so far) over a block."""

            def step(place: Scalar, state: Scalar) -> list[Scalar]:
                position = block * LOGITS_BLOCK + place
                value = logits.load(row * self.size + position.minimum(self.size - 1))
                value = position.less(end).select(value, k.scalar(MASKED, "f32"))
                return [body(value, place, state)]

            return k.fold(0, LOGITS_BLOCK, [first], step)[0]

        with k.loop(0, num_rows) as row, k.loop(0, self.num_blocks) as block:
            masked, zero, scale = k.scalar(MASKED, "f32"), k.scalar(0.0, "f32"), scales.load(row)
            top = over(row, block, masked, lambda value, _, so_far: so_far.maximum(value))
            total = over(
                row, block, zero,
                lambda value, _, so_far: so_far + ((value - top) * scale).math("exp"),
            )  # fmt: skip
            where = over(
                row, block, none,
                lambda value, place, so_far: _smaller(
                    k, so_far, value.is_below(top).select(none, place.to("i32").to("f32"))
                ),
            )  # fmt: skip
            self._store(summary, places, row, block, (top, total, where))

    def _arguments(self, k: ExecutableBuilder) -> tuple[Memory, Memory, Memory, Memory, Scalar]:
        logits, scales = (k.view(k.binding(read_only=True), "f32") for _ in range(2))
        summary, places = (k.view(k.binding(), "f32") for _ in range(2))
        return logits, scales, summary, places, k.constant()

    def _store(
        self, summary: Memory, places: Memory, row: Scalar, block: Scalar,
        found: tuple[Scalar, Scalar, Scalar],
    ) -> None:  # fmt: skip
        at = row * (1 + 2 * self.num_blocks) + block
        summary.store(found[0], at + 1)
        summary.store(found[1], at + (1 + self.num_blocks))
        places.store(found[2], row * self.num_blocks + block)


@dataclass(frozen=True)
class FindBest(Kernel):
    """The first of each row's likeliest tokens, which becomes the first entry of its summary.

    Bindings: places of maxima in blocks [N, blocks] f32, the summary. Constant: N. Workgroups: N.
    """

    size: int  # V

    @property
    def name(self) -> str:
        """By its size."""
        return f"find_best_{self.size}"

    @property
    def result(self) -> tuple[str, str]:
        """A number is found and not computed."""
        return "f32", ""

    def write(self, k: ThreadBuilder) -> None:
        """What each thread does: some of the blocks, of which the best come together."""
        row, thread, waves = k.workgroup(), k.thread(), THREADS // k.subgroup
        places, summary, _ = self._arguments(k)
        wave, is_leader = thread // k.subgroup, (thread % k.subgroup).equals(0)
        top, token = self._search(k, places, summary, row, thread, THREADS)
        tops, tokens = (k.shared(waves, "f32") for _ in range(2))
        largest = k.reduce("maxnumf", top)
        with k.when(is_leader):
            tops.store(largest, wave)
        k.barrier()
        largest = reduce(Scalar.maximum, [tops.load(i) for i in range(waves)])
        token = top.is_below(largest).select(k.scalar(self.size - 1, "f32"), token)
        token = k.reduce("minnumf", token)
        with k.when(is_leader):
            tokens.store(token, wave)
        k.barrier()
        with k.when(thread.equals(0)):
            best = reduce(lambda a, b: _smaller(k, a, b), [tokens.load(i) for i in range(waves)])
            summary.store(best, self._start(row))

    def write_plain(self, k: ExecutableBuilder) -> None:
        """Row by row."""
        places, summary, num_rows = self._arguments(k)
        with k.loop(0, num_rows) as row:
            _, token = self._search(k, places, summary, row, k.scalar(0, "index"), 1)
            summary.store(token, self._start(row))

    def _arguments(self, k: ExecutableBuilder) -> tuple[Memory, Memory, Scalar]:
        places = k.view(k.binding(read_only=True), "f32")
        return places, k.view(k.binding(), "f32"), k.constant()

    def _start(self, row: Scalar) -> Scalar:
        return row * (1 + 2 * _num_blocks(self.size))

    def _search(
        self, k: ExecutableBuilder, places: Memory, summary: Memory, row: Scalar, first: Scalar,
        step: int,
    ) -> list[Scalar]:  # fmt: skip
        """The largest logit of every `step`th block from `first` on, and its token as f32."""
        num_blocks, last = _num_blocks(self.size), k.scalar(self.size - 1, "f32")

        def look(block: Scalar, top: Scalar, token: Scalar) -> list[Scalar]:
            value = summary.load(self._start(row) + block + 1)
            start = (block * LOGITS_BLOCK).to("i32").to("f32")  # exact below 2^24
            here = _smaller(k, start + places.load(row * num_blocks + block), last)
            is_better = top.is_below(value)
            return [is_better.select(value, top), is_better.select(here, token)]

        return k.fold(first, num_blocks, [k.scalar(LOWEST, "f32"), last], look, step=step)


def _num_blocks(size: int) -> int:
    return -(-size // LOGITS_BLOCK)


def _smaller(k: ExecutableBuilder, a: Scalar, b: Scalar) -> Scalar:
    return k.op(f"arith.minnumf {a.name}, {b.name} : f32", "f32")


def summarize(kernels: Kernels, logits: Tensor, inv_temperatures: Tensor) -> Tensor:
    """The summary [N, 1 + 2 * blocks] f32 of logits [N, V] f32; inv_temperatures: [N] f32."""
    n, size = logits.shape
    blocks = SummarizeBlocks(int(size))
    outputs = [Tensor("", (n, width), "f32") for width in (1 + 2 * blocks.num_blocks,
                                                           blocks.num_blocks)]  # fmt: skip
    groups = -(-blocks.num_blocks // (THREADS // LANES))
    summary, places = kernels.call(
        blocks, (groups, n, 1), [n], [logits, inv_temperatures], outputs=outputs
    )
    return kernels.call(FindBest(int(size)), (n, 1, 1), [n], [places], [summary])[0]
