"""From the residual stream to logits, and what the sampler needs of them, on GPUs.

Shapes: N rows of a call, S tokens a row, T = N*S, H hidden features, V tokens of the vocabulary.
The sampler rarely needs all V logits on the host, so `summarize` makes one small array a row: the
best token, and for each block of 256 logits its maximum and the sum of its exponentials.
"""

from __future__ import annotations

from compile.formats.layout import MASKED
from compile.gpu.linear import Weights, whole_subgroups
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig
from sf_local.artifact.manifest import LOGITS_BLOCK

SEARCHED_AT_ONCE = 128  # logits: four for each of 32 lanes


def compute_logits(weights: Weights, config: LlamaConfig, x: Tensor) -> Tensor:
    """Logits [T, V] f32 of the residual stream x [T, H] f32."""
    head = "token_embd.weight" if config.tied_embeddings else "output.weight"
    return weights.norm_linear(x, "output_norm.weight", head, config.rms_eps)


def last_rows(b: Builder, x: Tensor, start: Tensor, seq_lens: Tensor, seq_len: Dim) -> Tensor:
    """Of x [T, H] f32, the row of each sequence's last valid token: [N, H].

    start, seq_lens: the first position and the one after the last, [N] i64. seq_len: S.
    """
    size = b.index(seq_len)

    def pick(start: Scalar, end: Scalar) -> Scalar:
        local = (end - start - 1).to("index").clamp(0, size - 1)
        row = b.position("n") * size + local
        return b.extract(x, row, b.position("h"))

    shape = (start.shape[0], x.shape[1])
    return b.generic("n,n->nh", [start, seq_lens], shape, "f32", pick)


def summarize(b: Builder, logits: Tensor, inv_temperatures: Tensor) -> Tensor:
    """A summary [N, 1 + 2 * blocks] f32 of logits [N, V] f32, small enough to copy to the host.

    The first of the likeliest tokens, then each block's maximum, then each block's sum of
    exp((logit - maximum) * inv_temperature). inv_temperatures: [N] f32.
    """
    n, vocab = logits.shape
    assert isinstance(vocab, int)
    num_blocks = -(-vocab // LOGITS_BLOCK)
    blocks = b.pad(logits, 1, num_blocks * LOGITS_BLOCK, MASKED)
    blocks = b.expand(blocks, 1, num_blocks, LOGITS_BLOCK)
    maxima = b.generic(
        "nbi->nb", [blocks], (n, num_blocks), "f32",
        lambda v, acc: acc.maximum(v), init=MASKED,
    )  # fmt: skip
    sums = b.generic(
        "nbi,nb,n->nb", [blocks, maxima, inv_temperatures], maxima.shape, "f32",
        lambda v, top, scale, acc: acc + ((v - top) * scale).math("exp"), init=0.0,
    )  # fmt: skip
    return _join(b, _first_largest(b, blocks, maxima, vocab), maxima, sums)


def _join(b: Builder, best: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """best [N] i32, maxima and sums [N, blocks] f32, side by side: [N, 1 + 2 * blocks] f32."""
    n, num_blocks = maxima.shape[0], int(maxima.shape[1])

    def entry() -> Scalar:
        place, row = b.position("k"), b.position("n")
        of_maximum = (place - 1).clamp(0, b.scalar(num_blocks - 1, "index"))
        of_sum = (place - 1 - num_blocks).clamp(0, b.scalar(num_blocks - 1, "index"))
        block = place.less(b.scalar(1 + num_blocks, "index")).select(
            b.extract(maxima, row, of_maximum), b.extract(sums, row, of_sum)
        )
        token = b.extract(best, row).to("f32")  # exact below 2^24
        return place.less(b.scalar(1, "index")).select(token, block)

    return b.generic("->nk", [], (n, 1 + 2 * num_blocks), "f32", entry)


def _first_largest(b: Builder, blocks: Tensor, maxima: Tensor, vocab: int) -> Tensor:
    """The first token with the largest logit of each row, [N] i32.

    Searched in parts of SEARCHED_AT_ONCE logits, then among what was found in them. A part is what
    a subgroup of 32 lanes reads at once, four numbers a lane: iree-compile 3.9.0 numbers the
    elements of a longer reduction as if all were in its first part.
    """
    n, num_blocks, size = blocks.shape
    none = b.scalar(vocab - 1, "i32")
    num_parts = int(size) // SEARCHED_AT_ONCE
    maxima = b.pad(maxima, 1, whole_subgroups(int(num_blocks)), MASKED)
    top = b.generic("nb->n", [maxima], (n,), "f32", lambda v, acc: acc.maximum(v), MASKED)

    def first_of_part(v: Scalar, top: Scalar, acc: Scalar) -> Scalar:
        part = b.position("b") * num_parts + b.position("p")
        token = part * SEARCHED_AT_ONCE + b.position("i")
        return acc.unsigned_minimum(v.is_below(top).select(none, token.to("i32")))

    parts = b.expand(blocks, 2, num_parts, SEARCHED_AT_ONCE)
    firsts = b.generic(
        "nbpi,n->nbp", [parts, top], parts.shape[:-1], "i32", first_of_part, vocab - 1
    )
    firsts = b.collapse(firsts, 1, 2)
    firsts = b.pad(firsts, 1, whole_subgroups(int(firsts.shape[1])), vocab - 1)
    return b.generic(
        "nk->n", [firsts], (n,), "i32", lambda v, acc: acc.unsigned_minimum(v), vocab - 1
    )
