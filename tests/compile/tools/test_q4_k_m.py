"""Which types a Q4_K_M file has, beside the rule that test_emitters has written down by itself."""

from __future__ import annotations

from compile.tools.gpu_report import SHAPES
from compile.tools.q4_k_m import q4_k_m_dtypes
from tests.compile.test_emitters import q4_k_m


def test_of_whole_super_blocks() -> None:
    shape = SHAPES["llama-3.2-1b"]
    found = q4_k_m_dtypes(shape)
    assert found == {name: q4_k_m(name, shape.num_layers).lower() for name in found}
    assert len(found) == 7 * shape.num_layers + 1
    assert q4_k_m_dtypes(SHAPES["llama-3.1-8b"])["token_embd.weight"] == "q4_k"


def test_of_others() -> None:
    found = q4_k_m_dtypes(SHAPES["smollm2-135m"])
    assert set(found.values()) == {"q4_k", "q6_k", "q5_0", "int8"}
    assert found["token_embd.weight"] == found["blk.0.attn_v.weight"] == "int8"
    assert found["blk.0.attn_q.weight"] == "q5_0" and found["blk.0.ffn_down.weight"] == "q6_k"
