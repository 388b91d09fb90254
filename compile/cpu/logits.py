"""LogitsPhases: the phases after the layers, which compute logits and their summaries.

Logits come in summary blocks of 256 tokens. For each block the kernel stores the maximum and the
sum of exp((logit - maximum) * inv_temperature), so that the sampler reads only the blocks it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compile.cpu.activations import Activations
from compile.cpu.matmul import Format
from compile.cpu.matrix_kernel import Matrix
from compile.cpu.row_tables import NUM_OUTPUTS, RowTables
from compile.cpu.transformer import TransformerKernel
from compile.formats.layout import MASKED
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.mlir.vectors import vector_type
from sf_local.artifact.manifest import LOGITS_BLOCK

BLOCKS_PER_TASK = 16  # summary blocks
AFTER_LAYERS = ("output_norm", "head", "summarize", "find_best")  # names of the phases


@dataclass(frozen=True)
class LogitsMemory:
    """Results of a call and what they need; rows are outputs, or all tokens [N, S].

    logits: f32 [rows, vocab]. best: i64 [rows]. maxima, sums: f32 [rows, summary blocks].
    inv_temperatures: f32 [rows], an argument.
    """

    logits: Memory
    best: Memory
    maxima: Memory
    sums: Memory
    inv_temperatures: Memory


class LogitsPhases:
    """Writes the phases AFTER_LAYERS of a kernel.

    head: the name of the matrix [vocab, hidden]; format_: how it is stored. act: activations that
    are multiplied with it.
    """

    def __init__(
        self, kernel: TransformerKernel, tables: RowTables, memory: LogitsMemory, head: str,
        format_: Format, act: Activations,
    ) -> None:  # fmt: skip
        self.kernel, self.tables, self.memory = kernel, tables, memory
        self.head_name, self.format, self.act = head, format_, act
        self.k, self.lanes = kernel.k, kernel.vectors.lanes
        self.vocab = tables.config.vocab_size
        self.num_blocks = -(-self.vocab // LOGITS_BLOCK)

    def write(self, *, all_logits: bool) -> None:
        """Write the phases; with `all_logits`, without summaries and best tokens."""
        k, kernel, tables = self.k, self.kernel, self.tables
        after = kernel.phases.after(k)
        outputs = tables.number(NUM_OUTPUTS)
        with kernel.phase(after["output_norm"], outputs) as i:
            weight = kernel.weight_at("output_norm.weight")
            kernel.rms_norm(tables.output_row(i), weight, self.act, i)
        head = kernel.weight_at(f"{self.head_name}.weight")
        matrix = Matrix.whole(kernel.matrices[self.head_name], self.format, head)
        kernel.matmul(after["head"], matrix, self.act, outputs, self._store)
        if all_logits:
            return
        num_tasks = -(-self.num_blocks // BLOCKS_PER_TASK)
        with kernel.phase(after["summarize"], outputs * num_tasks) as task:
            row, low = tables.output_to(task // num_tasks), task % num_tasks * BLOCKS_PER_TASK
            high = (low + BLOCKS_PER_TASK).minimum(k.scalar(self.num_blocks, "index"))
            with k.loop(low, high) as block:
                self._summarize(row, block)
        with kernel.phase(after["find_best"], outputs) as i:
            self._find_best(tables.output_to(i))

    def _store(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        for value, r, token in self.kernel.each(sums, row, block):
            count = self.kernel.num_valid(token, self.vocab)
            to = self.tables.output_to(r) * self.vocab + token
            self.memory.logits.store_vector(value, to, count)

    def _summarize(self, row: Scalar, block: Scalar) -> None:
        """Store the maximum and the sum of a summary block."""
        k, vocab, lanes, logits = self.k, self.vocab, self.lanes, self.memory.logits
        kind = vector_type(lanes, "f32")
        start = row * vocab + block * LOGITS_BLOCK
        count = (k.scalar(vocab, "index") - block * LOGITS_BLOCK).minimum(
            k.scalar(LOGITS_BLOCK, "index")
        )
        whole = count // lanes * lanes

        def larger(i: Scalar, top: Scalar) -> list[Scalar]:
            return [top.maximum(logits.load_vector(start + i, lanes))]

        def larger_one(i: Scalar, top: Scalar) -> list[Scalar]:
            return [top.maximum(logits.load(start + i))]

        [tops] = k.fold(0, whole, [k.scalar(MASKED, kind)], larger, lanes)
        [top] = k.fold(whole, count, [k.maximum(tops)], larger_one)
        scale = self.memory.inv_temperatures.load(row)
        wide_top, wide_scale = k.broadcast(top, lanes), k.broadcast(scale, lanes)

        def add(i: Scalar, total: Scalar) -> list[Scalar]:
            x = (logits.load_vector(start + i, lanes) - wide_top) * wide_scale
            return [total + x.math("exp")]

        def add_one(i: Scalar, total: Scalar) -> list[Scalar]:
            return [total + ((logits.load(start + i) - top) * scale).math("exp")]

        [sums] = k.fold(0, whole, [k.scalar(0.0, kind)], add, lanes)
        [total] = k.fold(whole, count, [k.sum(sums)], add_one)
        self.memory.maxima.store(top, row * self.num_blocks + block)
        self.memory.sums.store(total, row * self.num_blocks + block)

    def _find_best(self, row: Scalar) -> None:
        """Store the first token with the largest logit."""
        k, vocab, num = self.k, self.vocab, self.num_blocks
        state = [k.scalar(0, "index"), k.scalar(MASKED, "f32")]

        def better(memory: Memory, start: Scalar) -> Callable[..., Sequence[Scalar]]:
            def body(i: Scalar, best: Scalar, top: Scalar) -> Sequence[Scalar]:
                value = memory.load(start + i)
                is_more = top.is_below(value)
                return [is_more.select(i, best), is_more.select(value, top)]

            return body

        [block, _] = k.fold(0, num, state, better(self.memory.maxima, row * num))
        first = block * LOGITS_BLOCK
        count = (k.scalar(vocab, "index") - first).minimum(k.scalar(LOGITS_BLOCK, "index"))
        [token, _] = k.fold(0, count, state, better(self.memory.logits, row * vocab + first))
        self.memory.best.store((first + token).to("i64"), row)
