"""Prompts that begin with a generated text keep the tokens that the model wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from sf_local.text.prompt_encoder import MAX_TEXTS, PromptEncoder
from sf_local.text.tokenizer import Tokenizer
from tests.support.reference import random_weights, write_hf_folder
from tests.support.tiny import TINY


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Letters and the merges ab, abc and cd; `<s>` is special."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_hf_folder(folder, TINY, random_weights(TINY, 0))  # for its tokenizer_config.json
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *"abcdé ", "ab", "abc", "cd"])}
    for byte in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(byte, len(vocab))
    raw = RawTokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c"), ("c", "d")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.save(str(folder / "tokenizer.json"))
    return Tokenizer(Path(folder))


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """One token each."""
    ids = [tokenizer.encode(text) for text in texts]
    assert all(len(i) == 1 for i in ids)
    return [i[0] for i in ids]


def test_generated_tokens_are_kept(tokenizer: Tokenizer) -> None:
    """The model wrote a-b-c where the tokenizer writes abc; the rest is split afresh."""
    encode = PromptEncoder(tokenizer)
    prompt = tokenizer.encode("d")
    written = ids_of(tokenizer, "a", "b", "c")
    encode.remember("d", prompt, written, "abc")
    rest = tokenizer.encode("dab")
    assert encode("dabc" + "dab") == [*prompt, *written, *rest]
    assert encode("d" + "ab") == tokenizer.encode("dab")


def test_a_token_across_the_seam_is_split_as_the_tokenizer_would(tokenizer: Tokenizer) -> None:
    """ "ab" was generated, "c" follows: the prompt's own token abc begins before the seam."""
    encode = PromptEncoder(tokenizer)
    prompt = tokenizer.encode("dd")
    encode.remember("dd", prompt, ids_of(tokenizer, "a", "b"), "ab")
    assert encode("ddabc") == [*prompt, *ids_of(tokenizer, "abc")]


def test_a_trimmed_stop_string_and_an_end_token(tokenizer: Tokenizer) -> None:
    encode = PromptEncoder(tokenizer)
    prompt = tokenizer.encode("d")
    written = ids_of(tokenizer, "a", "b", "c", "d")
    encode.remember("d", prompt, written, "a")  # "b" was the stop
    assert encode("da" + "d") == [*prompt, written[0], *tokenizer.encode("d")]
    ended = [*ids_of(tokenizer, "a", "b"), 2]
    encode.remember("d", prompt, ended, "ab")
    assert encode("dab</s>" + "d") == [*prompt, *ended, *tokenizer.encode("d")]


@settings(max_examples=300)
@given(st.lists(st.integers(0, 11), max_size=8), st.text("abcdé ", max_size=12), st.data())
def test_the_text_is_always_the_same(
    tokenizer: Tokenizer, ids: list[int], rest: str, data: st.DataObject
) -> None:
    encode = PromptEncoder(tokenizer)
    prompt = data.draw(st.text("abcd", max_size=5))
    written = [i + 3 for i in ids]
    text = tokenizer.decode(written)
    encode.remember(prompt, tokenizer.encode(prompt), written, text)
    found = encode(prompt + text + rest)
    assert tokenizer.decode(found) == prompt + text + rest


def test_memory_is_bounded(tokenizer: Tokenizer) -> None:
    encode = PromptEncoder(tokenizer)
    for i in range(2 * MAX_TEXTS):
        encode.remember(str(i), [3], [4], "b")
    assert len(encode._texts) == MAX_TEXTS
    assert sum(encode._lengths.values()) == MAX_TEXTS
    assert encode._num_characters == sum(map(len, encode._texts))
