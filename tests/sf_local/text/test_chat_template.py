"""The model's own template, rendered here, is compared with transformers' own rendering."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.errors import ChatTemplateError, RequestError
from sf_local.text.chat_template import JinjaTemplate
from sf_local.text.messages import plain_messages
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
    ZEPHYR,
    byte_tokenizer,
)
from tests.support.conversations import TOOLS, by_transformers, conversations
from tests.support.published_templates import published_templates

TURNS = [
    {"role": "user", "content": "Why? "},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And\n\nthen?"},
]


@pytest.mark.parametrize(
    ("text", "config", "stop"),
    [
        (SMOLLM2, CHATML_TOKENS, "<|im_end|>"),
        (CHATML, CHATML_TOKENS, "<|im_end|>"),
        (LLAMA3, LLAMA3_TOKENS, "<|eot_id|>"),
        (LLAMA32, LLAMA3_TOKENS, "<|eot_id|>"),
        (LLAMA3, LLAMA3_TOKENS | {"add_bos_token": False}, "<|eot_id|>"),
        (ZEPHYR, LLAMA2_TOKENS, "</s>"),
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
    assert template.stop_strings == (stop,)
    messages = TURNS if system is None else [{"role": "system", "content": system}, *TURNS]
    if text == GEMMA and system is not None:
        with pytest.raises(ChatTemplateError, match="the model refuses a conversation of system"):
            template.render(messages)
        return
    expected = by_transformers(text, messages, add_generation_prompt=True, **tokenizer.named_tokens)
    assert template.render(messages) == expected


def same_as_transformers(
    template: JinjaTemplate, texts: Mapping[str, str], data: st.DataObject
) -> bool:
    """Whether transformers writes a conversation; as the template does, then."""
    messages = data.draw(conversations(with_parts=False))
    is_open = messages[-1]["role"] == "assistant" and data.draw(st.booleans())
    options: dict[str, Any] = {
        "tools": data.draw(st.sampled_from([None, TOOLS[:1], TOOLS])),
        "add_generation_prompt": not is_open and data.draw(st.booleans()),
        "continue_final_message": is_open,
    }
    variables = data.draw(st.sampled_from([{}, {"enable_thinking": False}]))
    default = texts["default"]
    text = default if options["tools"] is None else texts.get("tool_use", default)
    expected = by_transformers(text, messages, **options, **NAMED, **variables)
    try:
        written = template.render(plain_messages(messages), **options, variables=variables)
    except ChatTemplateError:
        written = None
    # Of a message without text there is nothing to continue, which transformers refuses as well
    assert written == expected or (is_open and expected is None)
    return expected is not None


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


@pytest.mark.parametrize("text", [CHATML, SMOLLM2, LLAMA3, LLAMA32, ZEPHYR, LLAMA2, GEMMA, GEMMA3])
def test_drawn_conversations(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    compared(text, tmp_path_factory.mktemp("tokenizer"), examples=40)


# Besides ChatML and Zephyr, which are above
WELL_KNOWN = (
    "meta-llama-Llama-3.1-8B-Instruct",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Mistral-Large-Instruct-2407",  # version 3 of Mistral's tokenizers
    "mistralai-Mistral-Nemo-Instruct-2407",
    "google-gemma-2-2b-it",
    "microsoft-Phi-3.5-mini-instruct",
    "phi-4",
    "ibm-granite-granite-3.3-2B-Instruct",
    "HuggingFaceTB-SmolLM3-3B",
    "c4ai-command-r-plus",
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
)


@pytest.mark.slow
def test_published_templates(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of 100 models, as far as transformers itself can compile them."""
    templates = published_templates()
    assert len(templates) >= 90
    written = {
        name: compared(
            text, tmp_path_factory.mktemp("tokenizer"), 100 if name in WELL_KNOWN else 30
        )
        for name, text in templates.items()
    }
    assert all(written[name] for name in WELL_KNOWN), written


@pytest.mark.slow
def test_published_templates_by_name(tmp_path: Path) -> None:
    """Command-R's, which has one of its own for tools."""
    published = published_templates()
    texts = {
        "default": published["c4ai-command-r-plus"],
        "tool_use": published["CohereForAI-c4ai-command-r-plus-tool_use"],
    }
    assert compared(texts, tmp_path, examples=100)


def compared(text: str | Mapping[str, str], folder: Path, examples: int) -> int:
    """How many drawn conversations transformers writes with a template, or named ones, as we do."""
    named = {"default": text} if isinstance(text, str) else text
    configured: Any = [{"name": name, "template": named[name]} for name in named]
    template = JinjaTemplate(byte_tokenizer(folder, configured, **NAMED), "the model")
    count = 0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal count
        count += same_as_transformers(template, named, data)

    check()
    return count


def test_contents_in_the_form_that_a_template_takes(tmp_path: Path) -> None:
    """Transformers writes nothing, or Python's repr of a list."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    written = {}
    for name, text in {"text": CHATML, "parts": OF_PARTS}.items():
        template = JinjaTemplate(byte_tokenizer(tmp_path, text), "m")
        for content in ("one", parts):
            message = {"role": "user", "content": content}
            written[name, content == parts] = template.render(plain_messages([message]))
    assert written["parts", False] == "[one]" and written["parts", True] == "[one][two]"
    assert "user\none<|im_end|>" in written["text", False]
    assert "user\none\ntwo<|im_end|>" in written["text", True]


OF_PARTS = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments"


@pytest.mark.parametrize("as_text", [" }}", "|tojson }}"])
def test_arguments_as_json_text(tmp_path: Path, as_text: str) -> None:
    """OpenAI's clients give arguments as JSON text, which many templates would quote again."""
    text = f"{CALLS}{as_text}{{% endfor %}}{{{{ m.content }}}}{{% endfor %}}"
    template = JinjaTemplate(byte_tokenizer(tmp_path, text), "m")
    function = {"name": "f", "arguments": '{"a": [1]}'}
    message = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    assert template.render(plain_messages([message])) == '{"a": [1]}'


def test_named_templates(tmp_path: Path) -> None:
    """As transformers chooses: "tool_use" with tools, if there is one."""
    texts = {"default": "D{{ bos_token }}", "tool_use": "T{{ tools|length }}", "rag": "R{{ 1 }}"}
    named = [{"name": name, "template": text} for name, text in texts.items()]
    tokenizer = byte_tokenizer(tmp_path, named, bos_token="<s>")
    template = JinjaTemplate(tokenizer, "m")
    messages = plain_messages([{"role": "user", "content": "Hi"}])
    assert template.render(messages) == "D<s>"
    assert template.render(messages, tools=TOOLS) == "T2"
    assert JinjaTemplate(tokenizer, "m", "rag").render(messages) == "R1"
    with pytest.raises(ChatTemplateError, match=r"'raag'.*default, tool_use, rag"):
        JinjaTemplate(tokenizer, "m", "raag")


@pytest.mark.parametrize(
    ("text", "config", "known", "refused"),
    [
        (CHATML, CHATML_TOKENS, ["critic", "user2", "developer"], {"asistant": "mean assistant"}),
        (LLAMA3, LLAMA3_TOKENS, ["critic"], {"USER": "did you mean user", "humna": None}),
        (ZEPHYR, LLAMA2_TOKENS, ["tool"], {"critic": "use system or user or assistant"}),
        (GEMMA, LLAMA2_TOKENS, ["assistant"], {"System": "did you mean system"}),
    ],
)
def test_roles(
    tmp_path: Path, text: str, config: dict[str, Any], known: list[str],
    refused: dict[str, str | None],
) -> None:  # fmt: skip
    """A slip of the pen is refused, and what would not be in the prompt; any other role is not."""
    template = JinjaTemplate(byte_tokenizer(tmp_path, text, **config), "m")
    template.check_roles([{"role": role, "content": "x"} for role in known])
    for role, remedy in refused.items():
        messages = [TURNS[0], {"role": role, "content": "x"}]
        if remedy is None:
            template.check_roles(messages)
        else:
            with pytest.raises(RequestError, match=rf"messages\[1\].role='{role}': .*{remedy}"):
                template.check_roles(messages)


def test_a_template_that_wants_contents(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"
    template = JinjaTemplate(byte_tokenizer(tmp_path, text), "m")
    with pytest.raises(ChatTemplateError, match='give each message a "content"'):
        template.render([{"role": "assistant", "tool_calls": [{"name": "f"}]}])


def test_a_message_that_cannot_be_continued(tmp_path: Path) -> None:
    template = JinjaTemplate(byte_tokenizer(tmp_path, "{{ messages|length }}"), "m")
    with pytest.raises(ChatTemplateError, match="does not write the last message"):
        template.render([{"role": "assistant", "content": "So"}], continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="no text to continue"):
        template.render([{"role": "assistant"}], continue_final_message=True)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, None)
    with pytest.raises(ChatTemplateError, match=r"m has no chat template in its tokenizer_config"):
        JinjaTemplate(tokenizer, "m")
    assert JinjaTemplate(tokenizer, "m", CHATML).stop_strings == ("<|im_end|>",)


def test_import_is_light() -> None:
    code = (
        "import sys, sf_local.text.chat_template; "
        "print({'transformers', 'sglang'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
