"""Tokens that only other files than tokenizer.json tell of; transformers judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from compile.sources.hf_tokenizer import open_tokenizer
from sf_local.errors import SourceError
from sf_local.text.tokenizer import Tokenizer
from tests.support.toy_tokenizers import byte_level_tokenizer

NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
DECODER = {
    "401": {"content": "<tool>", "lstrip": False, "rstrip": True, "normalized": False,
            "single_word": False, "special": False},
    "402": {"content": "<|turn|>", "special": True},
    "2": {"content": "<|im_end|>", "special": True},
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {"tokenizer_config.json": NAMED | {"added_tokens_decoder": DECODER}},
    "added_tokens": {
        "tokenizer_config.json": NAMED | {"pad_token": "<pad>"},
        "added_tokens.json": {"<pad>": 402, "<tool>": 401},
    },
    "additional": {"tokenizer_config.json": NAMED | {"additional_special_tokens": ["<|turn|>"]}},
    "extra": {
        "tokenizer_config.json": NAMED
        | {
            "extra_special_tokens": [
                {"__type": "AddedToken", "content": "<|turn|>", "special": True}
            ]
        }
    },
    "extra_by_name_and_additional": {
        "tokenizer_config.json": NAMED
        | {
            "extra_special_tokens": {"image_token": "<tool>"},
            "additional_special_tokens": ["<|turn|>"],
        }
    },
    "additional_of_two_files": {
        "tokenizer_config.json": NAMED | {"additional_special_tokens": ["<|turn|>"]},
        "special_tokens_map.json": NAMED | {"additional_special_tokens": ["<tool>"]},
    },
    "named": {"tokenizer_config.json": NAMED | {"image_token": "<tool>", "unk_token": "<unk>"}},
    "special_tokens_map": {
        "tokenizer_config.json": {},
        "special_tokens_map.json": NAMED | {"additional_special_tokens": ["<|turn|>"]},
    },
    "all_known": {"tokenizer_config.json": NAMED},
}
TEXTS = ("a<tool> b<|turn|>c<|im_end|>", "<pad><unk> <|im_start|>", "<think> <|endoftext|>")


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    byte_level_tokenizer().save(str(source / "tokenizer.json"))
    for file, content in FILES[name].items():
        (source / file).write_text(json.dumps(content))
    found = open_tokenizer(source)
    (out / "tokenizer.json").write_bytes(found.tokenizer_json)
    (out / "tokenizer_config.json").write_text(json.dumps(found.config))
    ours, theirs = Tokenizer(out), PreTrainedTokenizerFast.from_pretrained(source)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id == 2
    assert ("tokenizer.json lacks" in caplog.text) == (name != "all_known")
    if name == "all_known":
        assert found.tokenizer_json == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("entries", [[], {"a": {}}, {"1": {}}, {"1": "b"}, {"1": {"content": 3}}])
def test_damaged_lists(tmp_path: Path, entries: Any) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(SourceError, match="added tokens by id"):
        open_tokenizer(tmp_path)
