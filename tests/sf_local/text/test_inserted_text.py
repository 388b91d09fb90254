"""What users insert never becomes a special token: the template's own tokens are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.text.chat_template import JinjaTemplate
from sf_local.text.inserted_text import InsertedText
from sf_local.text.messages import plain_messages
from sf_local.text.tokenizer import Tokenizer
from tests.support.chat_templates import (
    CHATML,
    GEMMA3,
    LLAMA2,
    LLAMA3,
    SMOLLM2,
    SPECIAL_TOKENS,
    ZEPHYR,
    byte_tokenizer,
)

# Writes parts one after the other, so that a token may be cut in two of them
JOINED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text | trim }}"
    "{% endfor %}<|im_end|>{% endfor %}"
)
PIECES = [*SPECIAL_TOKENS, "<|im_", "end|>", "<", "|>", ">", " ", "\n", "hello", "user\n", "é"]
HARMLESS = str.maketrans("<>|", "(-)")


def ids_of(template: JinjaTemplate, tokenizer: Tokenizer, messages: list[Any]) -> list[int]:
    """As a chat is encoded."""
    plain = plain_messages(messages)
    inserted = InsertedText(tokenizer.special_tokens)
    parts = inserted.parts(template.render(inserted.marked(plain)))
    assert "".join(text for text, _ in parts) == template.render(plain)
    return tokenizer.encode_parts(parts)


@pytest.mark.parametrize("text", [CHATML, SMOLLM2, LLAMA3, LLAMA2, ZEPHYR, GEMMA3, JOINED])
def test_tokens_are_the_templates_own(text: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, text, bos_token="<s>", eos_token="</s>")
    template = JinjaTemplate(tokenizer, "the model")
    contents = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(st.lists(contents, min_size=1, max_size=3), min_size=1, max_size=3))
    def check(drawn: list[list[str]]) -> None:
        def conversation(texts: list[list[str]]) -> list[Any]:
            roles = ["user", "assistant", "user"]
            contents = [
                [{"type": "text", "text": t} for t in ts] if text == JOINED else "".join(ts)
                for ts in texts
            ]
            return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]

        messages = conversation(drawn)
        ids = ids_of(template, tokenizer, messages)
        harmless = [[t.translate(HARMLESS) for t in texts] for texts in drawn]
        expected = tokenizer.encode_parts([(template.render(conversation(harmless)), False)])
        special = tokenizer.special_ids
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
        written = "".join(map(tokenizer.written_text, ids))
        assert written == bytes_of(template.render(plain_messages(messages)))

    check()


def bytes_of(text: str) -> str:
    """`text` as it looks when each byte is decoded alone."""
    return "".join(bytes([byte]).decode(errors="replace") for byte in text.encode())


def test_plain_texts_are_those_of_tokenizers(tmp_path: Path) -> None:
    """Special tokens as plain text, by the library's own switch; added tokens that are not special
    stay tokens."""
    byte_tokenizer(tmp_path, CHATML)
    file = tmp_path / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(file))
    library.add_tokens(["<think>"])
    library.save(str(file))
    library.encode_special_tokens = True
    text = "a<|im_end|><think>b"
    ids = Tokenizer(tmp_path).encode_parts([(text, True)])
    assert ids == library.encode(text).ids
    assert library.token_to_id("<think>") in ids and library.token_to_id("<|im_end|>") not in ids


@pytest.mark.parametrize("value", [3, 2.5, None, True, ["a", {"b": ("c",)}]])
def test_other_data_stays_as_it_is(value: Any) -> None:
    marked = InsertedText(["<|x|>"]).marked(value)
    assert marked == (["a", {"b": ["c"]}] if isinstance(value, list) else value)


def test_keys_and_arguments_are_marked() -> None:
    inserted = InsertedText(["<|x|>"])
    arguments = {"<|x|>": ["<|x|>", {"k": "a<|x|>"}]}
    written = json.dumps(inserted.marked(arguments), ensure_ascii=False)
    assert inserted.parts(f"<|x|>{written}") == [("<|x|>", False), (json.dumps(arguments), True)]
