"""ProjectorPhases: the phases after a vision tower's layers, which make embeddings of tokens."""

from __future__ import annotations

from collections.abc import Callable

from compile.cpu.activations import Activations
from compile.cpu.transformer import TransformerKernel
from compile.mlir.activations import gelu
from compile.mlir.executable import Memory
from compile.mlir.values import Scalar
from compile.models.spec import VisionConfig

# Names of the phases, by family
AFTER_LAYERS = {"llava": ("patches", "mm.1", "mm.2"), "idefics3": ("post_ln", "mm.fc")}


class ProjectorPhases:
    """Writes the phases AFTER_LAYERS of a kernel.

    token_act: activations of tokens. out: embeddings f32 [tiles, tokens, text_hidden].
    """

    def __init__(
        self, kernel: TransformerKernel, config: VisionConfig, token_act: Activations, out: Memory,
        text_hidden: int,
    ) -> None:  # fmt: skip
        self.kernel, self.config = kernel, config
        self.token_act, self.out, self.text_hidden = token_act, out, text_hidden

    def write(self, num_tiles: Scalar, num_rows: Scalar) -> None:
        """Write the phases, for `num_tiles` tiles, `num_rows` rows in all."""
        kernel, config = self.kernel, self.config
        after = kernel.phases.after(kernel.k)
        tokens = num_tiles * config.tokens_per_tile
        if config.family == "llava":
            with kernel.rows_phase(after["patches"], tokens) as token:
                self._take_patch(token)
            kernel.linear(after["mm.1"], "mm.1", kernel.act, tokens, self._gelu)
            kernel.linear(after["mm.2"], "mm.2", self.token_act, tokens, self._store_embedding)
            return
        with kernel.rows_phase(after["post_ln"], num_rows) as row:
            kernel.layer_norm(row, "v.post_ln", None, self._shuffled(row))
        kernel.linear(after["mm.fc"], "mm.fc", self.token_act, tokens, self._store_embedding)

    def _shuffled(self, row: Scalar) -> Callable[[Scalar, Scalar], None]:
        """Where a patch's features go: to the token that it becomes a part of (pixel shuffle)."""
        c = self.config
        s, across = c.scale_factor, c.patches_across
        tile, patch = row // c.num_patches, row % c.num_patches
        y, x = patch // across, patch % across
        token = tile * c.tokens_per_tile + y // s * (across // s) + x // s
        first = (y % s * s + x % s) * c.hidden_size
        return lambda value, i: self.token_act.store([value], token, first + i)

    def _take_patch(self, token: Scalar) -> None:
        """Store the patch of a token as activations; the class token before them is left out."""
        c, lanes = self.config, self.kernel.vectors.lanes
        row = token // c.num_patches * c.num_positions + token % c.num_patches + 1
        with self.kernel.k.loop(0, self.kernel.hidden, lanes) as i:
            value = self.kernel.residual.load_vector(row * self.kernel.hidden + i, lanes)
            self.kernel.act.store([value], token, i)

    def _gelu(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        for value, r, feature in self.kernel.each(sums, row, block):
            self.token_act.store([gelu(value)], r, feature)

    def _store_embedding(self, sums: list[Scalar], row: Scalar, block: Scalar) -> None:
        width = self.text_hidden
        for value, r, feature in self.kernel.each(sums, row, block):
            count = self.kernel.num_valid(feature, width)
            self.out.store_vector(value, r * width + feature, count)
