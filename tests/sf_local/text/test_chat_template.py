"""The model's own template, rendered here, is compared with transformers' own rendering."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sf_local.errors import ChatTemplateError
from sf_local.text.chat_template import JinjaTemplate
from tests.support.chat_templates import (
    CHATML,
    CHATML_TOKENS,
    GEMMA,
    GEMMA3,
    LLAMA2,
    LLAMA2_TOKENS,
    LLAMA3,
    LLAMA3_TOKENS,
    LLAMA32,
    SMOLLM2,
    TINYLLAMA,
    byte_tokenizer,
    rendered_by_transformers,
)

TURNS = [("user", "Why? "), ("assistant", "So."), ("user", "And\n\nthen?")]


@pytest.mark.parametrize(
    ("text", "config", "stop"),
    [
        (SMOLLM2, CHATML_TOKENS, "<|im_end|>"),
        (CHATML, CHATML_TOKENS, "<|im_end|>"),
        (LLAMA3, LLAMA3_TOKENS, "<|eot_id|>"),
        (LLAMA32, LLAMA3_TOKENS, "<|eot_id|>"),
        (LLAMA3, LLAMA3_TOKENS | {"add_bos_token": False}, "<|eot_id|>"),
        (TINYLLAMA, LLAMA2_TOKENS, "</s>"),
        (LLAMA2, LLAMA2_TOKENS, "</s>"),
        (GEMMA, LLAMA2_TOKENS, "<end_of_turn>"),
        (GEMMA3, LLAMA2_TOKENS, "<end_of_turn>"),
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_prompts_are_those_of_transformers(
    tmp_path: Path, text: str, config: dict[str, Any], stop: str, system: str | None
) -> None:
    tokenizer = byte_tokenizer(tmp_path, text, **config)
    template = JinjaTemplate(tokenizer, "the model")
    assert template.stop_strings() == (stop,)
    turns = TURNS if system is None else [("system", system), *TURNS]
    if text == GEMMA and system is not None:
        with pytest.raises(ChatTemplateError, match="the model refuses a conversation of system"):
            template.render(turns)
        return
    written = template.render(turns)
    if tokenizer.adds_bos:
        assert not written.startswith(tokenizer.bos_token or "")
    expected = rendered_by_transformers(text, tokenizer, turns)
    assert tokenizer.encode(written) == tokenizer.encode(expected)  # one BOS in both


def test_contents_as_parts(tmp_path: Path) -> None:
    """Templates of vision models may write a text only if it is a part of a list."""
    text = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert JinjaTemplate(byte_tokenizer(tmp_path, text), "m").render([("user", "hi")]) == "[hi]"


def test_no_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, None)
    with pytest.raises(ChatTemplateError, match=r"m has no chat template in its tokenizer_config"):
        JinjaTemplate(tokenizer, "m")
    assert JinjaTemplate(tokenizer, "m", CHATML).stop_strings() == ("<|im_end|>",)


def test_import_is_light() -> None:
    code = (
        "import sys, sf_local.text.chat_template; "
        "print({'transformers', 'sglang'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
