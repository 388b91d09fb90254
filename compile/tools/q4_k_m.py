"""The types of a Q4_K_M file, by which `gpu_report` knows a model without having one."""

from __future__ import annotations

from compile.formats.blocks import BLOCK_TYPES
from compile.models.spec import LlamaConfig
from compile.models.tensors import ModelTensor, decoder_tensors


def q4_k_m_dtypes(config: LlamaConfig) -> dict[str, str]:
    """What matrices are in a Q4_K_M file, by canonical name, as llama.cpp chooses."""
    table, eighth = decoder_tensors(config), config.num_layers // 8
    dtypes: dict[str, str] = {}
    for i, layer in enumerate(table.layers):
        is_outer = i < eighth or i >= 7 * config.num_layers // 8
        gets_more = is_outer or (i - eighth) % 3 == 2
        for tensor in layer:
            for name in tensor.sources if tensor.is_matrix else ():
                has_more = gets_more and ("attn_v" in name or "ffn_down" in name)
                dtypes[name] = _of_rows("q6_k" if has_more else "q4_k", tensor)
    *others, head = [table.embedding, *table.head]
    for tensor in others:
        dtypes |= dict.fromkeys(tensor.sources, _of_rows("q4_k", tensor))
    return dtypes | dict.fromkeys(head.sources, _of_rows("q6_k", head))


def _of_rows(dtype: str, tensor: ModelTensor) -> str:
    """The type, or what llama.cpp takes for rows of no whole super-blocks."""
    if tensor.shape[1] % BLOCK_TYPES[dtype].columns == 0:
        return dtype
    return {"q4_k": "q5_0", "q6_k": "int8"}[dtype]
