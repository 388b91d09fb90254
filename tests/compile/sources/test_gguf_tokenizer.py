"""GGUF tokenizer metadata -> tokenizers: small vocabularies, every kind, every refusal."""

import time
from typing import Any

import pytest

from compile.sources.gguf_tokenizer import convert_tokenizer, sentencepiece_merges, special_id
from sf_local.errors import SourceError, UnsupportedError
from tests.support.toy_tokenizers import byte_level_fields


def sentencepiece_fields(**extra: Any) -> dict:
    """Llama 2's layout: <unk> <s> </s>, 256 bytes, then pieces with scores."""
    pieces = {
        "▁the": -1.0, "▁t": -2.0, "he": -3.0, "in": -4.0, "▁a": -5.0, "▁": -6.0, "t": -7.0,
        "h": -8.0, "e": -9.0, "i": -10.0, "n": -11.0, "a": -12.0,
    }  # fmt: skip
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*specials, *pieces, "<tool>"],
        "tokenizer.ggml.scores": [0.0] * len(specials) + [*pieces.values(), 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
    }
    return fields | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def tokens_of(fields: dict, text: str) -> list[str]:
    return convert_tokenizer(fields)[0].encode(text).tokens


def test_smollm_splits_digits_and_keeps_special_tokens_whole() -> None:
    fields = byte_level_fields(words=("Ġhello", "123"))
    assert tokens_of(fields, "a hello 123<eos>") == ["a", "Ġhello", "Ġ", "1", "2", "3", "<eos>"]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_byte_level_round_trip(pre: str) -> None:
    tokenizer, _ = convert_tokenizer(byte_level_fields(pre, ("Ġhello",)))
    text = " Grüße,\n\n  hello 1234 漢字 🙂\t<"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_splits_digits_by_three_and_adds_bos(pre: str) -> None:
    fields = byte_level_fields(pre, ("1234", "Ġhello"))
    assert tokens_of(fields, "12345 hello") == ["<bos>", "123", "4", "5", "Ġhello"]


def test_llama3_takes_whole_words_without_merges() -> None:
    fields = byte_level_fields("llama-bpe")
    fields["tokenizer.ggml.tokens"].append("Ġworld")  # no merges lead to it
    fields["tokenizer.ggml.token_type"].append(1)
    assert tokens_of(fields, "a world") == ["<bos>", "a", "Ġworld"]


def test_bos_and_eos_as_the_file_says() -> None:
    fields = byte_level_fields(add_bos_token=True, add_eos_token=True)
    tokenizer, config = convert_tokenizer(fields)
    assert tokenizer.encode("a").tokens == ["<bos>", "a", "<eos>"]
    assert tokenizer.encode("a", "b").tokens == ["<bos>", "a", "<eos>", "<bos>", "b", "<eos>"]
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert config["add_bos_token"] and config["add_eos_token"]
    assert tokens_of(byte_level_fields("llama-bpe", add_bos_token=False), "a") == ["a"]


def test_tokenizer_config() -> None:
    fields = byte_level_fields(padding_token_id=1, unknown_token_id=0xFFFFFFFF)
    fields["tokenizer.chat_template"] = "{{ messages }}"
    assert convert_tokenizer(fields)[1] == {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    fields |= {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "{{ x }}"}
    assert convert_tokenizer(fields)[1]["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "rag", "template": "{{ x }}"},
    ]


def test_sentencepiece_merges_best_score_first() -> None:
    assert tokens_of(sentencepiece_fields(), "the in") == ["<s>", "▁the", "▁", "in"]


def test_sentencepiece_bytes_specials_and_round_trip() -> None:
    tokenizer, config = convert_tokenizer(sentencepiece_fields())
    encoded = tokenizer.encode("a é</s><tool>")
    assert encoded.tokens == [
        "<s>", "▁a", "▁", "<0xC3>", "<0xA9>", "</s>", "<tool>",
    ]  # fmt: skip
    assert tokenizer.decode(encoded.ids) == "a é<tool>"  # control is special, user-defined not
    assert tokenizer.decode(tokenizer.encode("  the\n漢 in ").ids) == "  the\n漢 in "
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>", "</s>", "<unk>",
    )  # fmt: skip


def test_sentencepiece_does_not_build_byte_tokens_from_text() -> None:
    fields = sentencepiece_fields()
    for piece in ("<0x0A", ">"):
        fields["tokenizer.ggml.tokens"].append(piece)
        fields["tokenizer.ggml.scores"].append(-20.0)
        fields["tokenizer.ggml.token_type"].append(1)
    assert "<0x0A>" not in tokens_of(fields, "<0x0A>")


def test_sentencepiece_without_space_prefix() -> None:
    fields = sentencepiece_fields(add_space_prefix=False, add_bos_token=False)
    tokenizer, _ = convert_tokenizer(fields)
    assert tokenizer.encode("the the").tokens == ["t", "he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


def test_merges_are_those_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = ["a", "b", "ab", "ba", "aba", "bab", "abab", "aa", "aaa"]
    scores = [-1.0, -2.0, -3.0, -3.0, -4.0, -4.0, -4.0, -7.0, -5.0]
    vocab = {token: i for i, token in enumerate(tokens)}
    expected = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    assert sentencepiece_merges(tokens, scores, [1] * len(tokens)) == expected


def test_a_large_vocabulary_is_fast() -> None:
    fields = byte_level_fields("llama-bpe")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in letters for b in letters for c in letters]
    pairs = [a + b for a in letters for b in letters]
    big = [word + pair for word in words for pair in pairs[:7]]
    new = [*pairs, *words, *big]
    fields["tokenizer.ggml.tokens"] += new
    fields["tokenizer.ggml.token_type"] += [1] * len(new)
    fields["tokenizer.ggml.merges"] = [
        *(f"{p[0]} {p[1]}" for p in pairs),
        *(f"{w[:2]} {w[2]}" for w in words),
        *(f"{b[:3]} {b[3:]}" for b in big),
    ]
    start = time.thread_time()
    convert_tokenizer(fields)
    assert len(new) > 128_000
    assert time.thread_time() - start < 5  # about 1


@pytest.mark.parametrize(
    ("model", "pre"),
    [("gpt2", "qwen2"), ("gpt2", None), ("t5", "default"), ("bert", None), (["gpt2"], ["smollm"])],
)
def test_other_tokenizers_are_refused_by_name(model: Any, pre: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        convert_tokenizer(byte_level_fields(model=model, pre=pre))
    assert repr(model) in str(caught.value) and repr(pre) in str(caught.value)
    assert "'smollm'" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokens", None, "tokenizer.ggml.tokens"),
        ("tokens", [1, 2], "array of str"),
        ("token_type", [1], "one a token"),
        ("token_type", "abc", "array of int"),
        ("merges", None, "tokenizer.ggml.merges"),
        ("merges", ["a b"], "contradict"),  # "ab" is not a token
        ("merges", ["ab"], "contradict"),
        ("bos_token_id", 100_000, "bos_token_id"),
        ("eos_token_id", "x", "eos_token_id"),
    ],
)
def test_damaged_metadata(key: str, value: Any, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        convert_tokenizer(byte_level_fields(**{key: value}))


def test_damaged_sentencepiece() -> None:
    with pytest.raises(SourceError, match="scores"):
        convert_tokenizer(sentencepiece_fields(scores=None))
    with pytest.raises(SourceError, match="scores"):
        convert_tokenizer(sentencepiece_fields(scores=[0.0]))


def test_no_tokenizer_at_all() -> None:
    with pytest.raises(SourceError, match="no tokenizer"):
        convert_tokenizer({"general.architecture": "llama"})


def test_special_ids() -> None:
    assert special_id(byte_level_fields(), "eot") is None
    assert special_id(byte_level_fields(eot_token_id=7), "eot") == 7
    assert special_id(sentencepiece_fields(), "eos") == 2  # llama.cpp's default
