"""From the residual stream to logits, on GPUs.

Shapes: N rows of a call, S tokens a row, T = N*S, H hidden features, V tokens of the vocabulary.
"""

from __future__ import annotations

from compile.gpu.linear import Weights
from compile.mlir.builder import Builder, Dim, Tensor
from compile.mlir.values import Scalar
from compile.models.spec import LlamaConfig


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
