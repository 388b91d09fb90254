"""RowTables: which rows a call of a language model's kernel has, found out by the kernel itself.

The valid tokens of all sequences are the rows, without padding. Attention takes them in groups: up
to `rows_per_task` rows of one sequence. Outputs are the rows after which logits are wanted. Shapes:
N sequences, S tokens of each at most, B pages of each, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from compile.cpu.attention import Attention
from compile.cpu.kernel import KernelBuilder
from compile.cpu.softmax import SPLIT
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from compile.options import ModelOptions

# Places in the header
NUM_ROWS, NUM_GROUPS, NUM_OUTPUTS, NUM_SPLITS = range(4)
# Columns of the table: of rows, then of groups, then of outputs
SEQUENCE, POSITION, TOKEN, GROUP_ROW, GROUP_LEN, OUTPUT_ROW, OUTPUT_TO = range(7)
NUM_COLUMNS = 7


@dataclass(frozen=True)
class KernelKind:
    """What a kernel computes.

    all_logits: logits after every token; else after each sequence's last one, with their
    summaries. is_decode: sequences have one token, and their contexts are split.
    """

    name: str
    all_logits: bool
    is_decode: bool


@dataclass(frozen=True)
class CallMemory:
    """Arguments of a call, i64: tokens [N, S], start_pos [N], seq_lens [N], page_ids [N, B].

    Then the tables, i32: header [4], table [NUM_COLUMNS, N * S].
    """

    tokens: Memory
    start_pos: Memory
    seq_lens: Memory
    page_ids: Memory
    header: Memory
    table: Memory


@dataclass(frozen=True)
class CallSizes:
    """N, S, B, and the most splits of a context that there is memory for."""

    n: Scalar
    seq_len: Scalar
    num_pages: Scalar
    most_splits: Scalar


class RowTables:
    """Fills the tables and reads them.

    takes_embeds: negative tokens stand for embeddings that the caller gives.
    """

    def __init__(
        self, k: KernelBuilder, config: LlamaConfig, options: ModelOptions, kind: KernelKind,
        memory: CallMemory, sizes: CallSizes, *, takes_embeds: bool,
    ) -> None:  # fmt: skip
        self.k, self.config, self.options, self.kind = k, config, options, kind
        self.memory, self.sizes = memory, sizes
        self._lowest_token = -1 if takes_embeds else 0
        self._max_rows = sizes.n * sizes.seq_len

    # What the tables say

    def number(self, place: int) -> Scalar:
        """A number of the header."""
        return self.memory.header.load(place).to("index")

    def _load(self, column: int, row: Scalar) -> Scalar:
        return self.memory.table.load(self._max_rows * column + row).to("index")

    def sequence(self, row: Scalar) -> Scalar:
        """The sequence of a row."""
        return self._load(SEQUENCE, row)

    def position(self, row: Scalar) -> Scalar:
        """The position of a row in its sequence."""
        return self._load(POSITION, row)

    def token(self, row: Scalar) -> Scalar:
        """The token of a row."""
        return self._load(TOKEN, row)

    def group(self, i: Scalar) -> tuple[Scalar, Scalar]:
        """The first row of a group, and the number of its rows."""
        return self._load(GROUP_ROW, i), self._load(GROUP_LEN, i)

    def output_row(self, i: Scalar) -> Scalar:
        """The row after which output i wants logits."""
        return self._load(OUTPUT_ROW, i)

    def output_to(self, i: Scalar) -> Scalar:
        """The row of the logits to which output i goes."""
        return self._load(OUTPUT_TO, i)

    def page(self, row: Scalar, position: Scalar) -> Scalar:
        """The page that holds a position of a row's sequence, or else the sequence's last page."""
        num_pages = self.sizes.num_pages
        column = (position // self.options.page_size).minimum(num_pages - 1)
        return self.memory.page_ids.load(self.sequence(row) * num_pages + column).to("index")

    # Filling them

    def fill(self, attention: Attention) -> None:
        """Fill the tables; one workgroup does."""
        k, memory, sizes = self.k, self.memory, self.sizes
        zero = k.scalar(0, "i32")
        for place in (NUM_ROWS, NUM_GROUPS, NUM_OUTPUTS):
            memory.header.store(zero, place)
        memory.header.store(k.scalar(1, "i32"), NUM_SPLITS)
        with k.loop(0, sizes.n) as n:
            start, end = (x.load(n).to("index") for x in (memory.start_pos, memory.seq_lens))
            count = (end - start).clamp(0, sizes.seq_len)
            first = self.number(NUM_ROWS)
            with k.loop(0, count) as s:
                self._set_row(first + s, n, start + s, memory.tokens.load(n * sizes.seq_len + s))
            self._append_groups(first, count, attention)
            self._append_outputs(first, count, n)
            memory.header.store((first + count).to("i32"), NUM_ROWS)
            if self.kind.is_decode:
                splits = ((end + (SPLIT - 1)) // SPLIT).minimum(sizes.most_splits)
                most = splits.largest(self.number(NUM_SPLITS))
                memory.header.store(most.to("i32"), NUM_SPLITS)

    def _set_row(self, row: Scalar, sequence: Scalar, position: Scalar, token: Scalar) -> None:
        last = self.k.scalar(self.options.max_seq_len - 1, "index")
        last_token = self.config.vocab_size - 1
        token = token.to("index").clamp(self._lowest_token, self.k.scalar(last_token, "index"))
        values = {SEQUENCE: sequence, POSITION: position.minimum(last), TOKEN: token}
        for column, value in values.items():
            self.memory.table.store(value.to("i32"), self._max_rows * column + row)

    def _append_groups(self, first: Scalar, count: Scalar, attention: Attention) -> None:
        k, most = self.k, attention.rows_per_task
        if attention.takes_any_count:
            with k.loop(0, count, most) as i:
                length = (count - i).minimum(k.scalar(most, "index"))
                self._append(NUM_GROUPS, GROUP_ROW, first + i, length)
            return
        whole = count // most
        with k.loop(0, whole) as i:
            self._append(NUM_GROUPS, GROUP_ROW, first + i * most, k.scalar(most, "index"))
        with k.loop(whole * most, count) as i:
            self._append(NUM_GROUPS, GROUP_ROW, first + i, k.scalar(1, "index"))

    def _append_outputs(self, first: Scalar, count: Scalar, n: Scalar) -> None:
        if self.kind.all_logits:
            with self.k.loop(0, count) as s:
                self._append(NUM_OUTPUTS, OUTPUT_ROW, first + s, n * self.sizes.seq_len + s)
        else:
            with self.k.when(self.k.scalar(0, "index").less(count)):
                self._append(NUM_OUTPUTS, OUTPUT_ROW, first + count - 1, n)

    def _append(self, place: int, column: int, first: Scalar, second: Scalar) -> None:
        """Append an entry of two columns, whose number the header counts at `place`."""
        at = self.number(place)
        for i, value in enumerate((first, second)):
            self.memory.table.store(value.to("i32"), self._max_rows * (column + i) + at)
        self.memory.header.store((at + 1).to("i32"), place)
