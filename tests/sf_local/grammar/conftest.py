"""A tokenizer of single bytes, and grammars for it."""

from __future__ import annotations

import pytest

from sf_local.grammar.compiler import GrammarCompiler
from sf_local.text.tokenizer import Tokenizer
from tests.support.toy_tokenizers import byte_level_tokenizer, save
from tests.support.walk import EOS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte_level")
    return save(folder, byte_level_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))
