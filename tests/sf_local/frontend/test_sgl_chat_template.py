"""Derived templates are compared with transformers' own rendering, through sglang's interpreter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import ChatTemplate, ChatTemplateStyle, get_chat_template

from sf_local.errors import ChatTemplateError
from sf_local.frontend.sgl_chat_template import resolve_chat_template
from sf_local.text.tokenizer import Tokenizer
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
from tests.support.conversations import by_transformers
from tests.support.sglang_state import error_of


@pytest.fixture
def make(tmp_path: Path) -> Any:
    return functools.partial(byte_tokenizer, tmp_path)


class Scripted(BaseBackend):
    """Writes the same reply every time, and keeps the prompts."""

    def __init__(self, template: ChatTemplate, reply: str) -> None:
        super().__init__()
        self.template, self.reply, self.prompts = template, reply, []

    def get_chat_template(self) -> ChatTemplate:
        return self.template

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        self.prompts.append(s.text_)
        return self.reply, {}


@sgl.function
def conversation(s: Any, system: str | None) -> Any:
    if system is not None:
        s += sgl.system(system)
    for turn in range(3):
        s += sgl.user(f"Question {turn}?")
        s += sgl.assistant(sgl.gen(f"reply{turn}"))


@sgl.function
def plain(s: Any) -> Any:
    s += "Once" + sgl.gen("reply")


def answer(program: Any, template: ChatTemplate, *arguments: Any) -> Any:
    return program.run(*arguments, backend=Scripted(template, "An answer."))


def sglang_prompts(template: ChatTemplate, system: str | None, reply: str) -> list[str]:
    backend = Scripted(template, reply)
    state = conversation.run(system, backend=backend)
    state.sync()
    assert state.error() is None
    return backend.prompts


def model_prompts(text: str, tokenizer: Tokenizer, system: str | None) -> list[str]:
    """What transformers renders for the same conversation."""
    named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    messages = [] if system is None else [{"role": "system", "content": system}]
    prompts = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        prompts.append(by_transformers(text, messages, add_generation_prompt=True, **named) or "")
        messages.append({"role": "assistant", "content": "An answer."})
    return prompts


@pytest.mark.parametrize(
    ("text", "config", "reply"),
    [
        (SMOLLM2, CHATML_TOKENS, "An answer."),
        (CHATML, CHATML_TOKENS, "An answer."),
        (LLAMA3, LLAMA3_TOKENS, "An answer."),
        (LLAMA32, LLAMA3_TOKENS, "An answer."),
        (LLAMA32, LLAMA3_TOKENS | {"add_bos_token": False}, "An answer."),
        (LLAMA3, LLAMA3_TOKENS | {"add_bos_token": False}, "An answer."),
        (ZEPHYR, LLAMA2_TOKENS, "An answer."),
        (LLAMA2, LLAMA2_TOKENS, " An answer."),  # the model writes the space
        (LLAMA2, LLAMA2_TOKENS | {"add_bos_token": False}, " An answer."),
        (GEMMA3, LLAMA2_TOKENS, "An answer."),
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_sglang_writes_what_the_model_expects(
    make: Any, text: str, config: dict[str, Any], reply: str, system: str | None
) -> None:
    tokenizer = make(text, **config)
    template = resolve_chat_template(None, tokenizer, "model")
    written = sglang_prompts(template, system, reply)
    expected = model_prompts(text, tokenizer, system)
    if tokenizer.adds_bos:
        assert not any(prompt.startswith(tokenizer.bos_token) for prompt in written)
    assert list(map(tokenizer.encode, written)) == list(
        map(tokenizer.encode, expected)
    )  # one BOS in both


def test_smollm2(make: Any) -> None:
    template = resolve_chat_template(None, make(SMOLLM2, **CHATML_TOKENS), "smollm2")
    chatml = get_chat_template("chatml")
    assert type(template) is ChatTemplate
    assert template.name == "smollm2"
    assert template.role_prefix_and_suffix == chatml.role_prefix_and_suffix
    assert template.stop_str == ("<|im_end|>",)
    assert template.default_system_prompt == (
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    assert template.style is ChatTemplateStyle.PLAIN


def test_llama3(make: Any) -> None:
    template = resolve_chat_template(None, make(LLAMA3, **LLAMA3_TOKENS), "llama-3")
    known = get_chat_template("llama-3-instruct")
    assert template.role_prefix_and_suffix == known.role_prefix_and_suffix
    assert template.stop_str == known.stop_str == ("<|eot_id|>",)
    assert template.default_system_prompt is None


def test_tinyllama(make: Any) -> None:
    template = resolve_chat_template(None, make(ZEPHYR, **LLAMA2_TOKENS), "tinyllama")
    assert template.role_prefix_and_suffix["user"] == ("<|user|>\n", "</s>\n")
    assert template.role_prefix_and_suffix["assistant"] == ("<|assistant|>\n", "</s>\n")
    assert template.stop_str == ("</s>",)


def test_llama2(make: Any) -> None:
    template = resolve_chat_template(None, make(LLAMA2, **LLAMA2_TOKENS), "llama-2")
    known = get_chat_template("llama-2-chat")
    assert template.style is ChatTemplateStyle.LLAMA2
    assert template.role_prefix_and_suffix == known.role_prefix_and_suffix
    assert template.stop_str == ("</s>",)


def test_no_stop_without_a_special_token(make: Any) -> None:
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    template = resolve_chat_template(None, make(text), "plain")
    assert template.role_prefix_and_suffix["user"] == ("user: ", "\n")
    assert template.stop_str == ()


def test_training_marks_and_filters(make: Any) -> None:
    text = CHATML.replace("{% endfor %}", "{% generation %}{% endgeneration %}{% endfor %}")
    text += "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    template = resolve_chat_template(None, make(text, **CHATML_TOKENS), "chatml")
    assert template.role_prefix_and_suffix == get_chat_template("chatml").role_prefix_and_suffix


THINKS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
FORGETS = CHATML.replace("{% for message in messages %}", "{% for message in messages[-1:] %}")
CUTS = CHATML.replace("message['content'] +", "message['content'].split('</think>\\n\\n')[-1] +")
NUMBERS = CHATML.replace("'<|im_start|>' + ", "'<|im_start|>' ~ loop.index ~ ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FORGETS, "does not write the user message once"),
        (NUMBERS, "is not a prefix and a suffix for each role: the model expects"),
        ("{% for m in messages %}{{ m.content }}", "is not valid Jinja"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, "refuses a conversation"),
        ("{{ messages.append(1) }}" + CHATML, "refuses a conversation"),
        ("{% for i in range(10000000000) %}{% endfor %}" + CHATML, "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML, "refuses a conversation"),
        ("constant", "does not write the user message once"),
    ],
)
def test_only_roles_fail_with_a_template_that_has_none(make: Any, text: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as warned:
        template = resolve_chat_template(None, make(text, **CHATML_TOKENS), "the model")
    assert len(warned) == 1
    assert "the model" in str(warned[0].message) and "chat_template=" in str(warned[0].message)
    assert isinstance(answer(plain, template)["reply"], str)
    error = error_of(answer(conversation, template, None))
    assert isinstance(error, ChatTemplateError) and message in str(error)
    with pytest.raises(ChatTemplateError, match=message):  # given by the user, it is a mistake
        resolve_chat_template(text if "{" in text else "{{''}}" + text, make(None), "the model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GEMMA, "System role not supported"),
        (CHATML.replace("in messages %", "in messages if message.role != 'system' %"), "once"),
        ("{{ messages | length if messages[0].role == 'system' }}" + CHATML, "model expects '2<"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*blanks")
def test_a_template_without_system_messages(make: Any, text: str, message: str) -> None:
    tokenizer = make(text, **LLAMA2_TOKENS)
    template = resolve_chat_template(None, tokenizer, "model")
    written = sglang_prompts(template, None, "An answer.")
    assert list(map(tokenizer.encode, written)) == list(
        map(tokenizer.encode, model_prompts(text, tokenizer, None))
    )
    with pytest.raises(ChatTemplateError, match=f"{message}.*first sgl.user"):
        raise error_of(answer(conversation, template, "Be brief.")) or AssertionError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LLAMA3, r"With blanks around contents the model expects .*\\n\\nUserMarker"),
        (THINKS, "In a later turn the model expects .*SGLang writes .*<think>"),
        (CUTS, r"After a reply that reasons the model expects .*assistant\\nReply.*<think>"),
    ],
)
def test_one_warning_names_what_is_lost(make: Any, text: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as warned:
        template = resolve_chat_template(None, make(text, **LLAMA3_TOKENS), "the model")
    assert len(warned) == 1
    tokenizer = make(text, **LLAMA3_TOKENS)
    [first, *_] = sglang_prompts(template, None, "An answer.")
    assert tokenizer.encode(first) == tokenizer.encode(model_prompts(text, tokenizer, None)[0])


@pytest.mark.parametrize("text", [SMOLLM2, CHATML, ZEPHYR])
def test_no_warning_where_nothing_is_lost(
    make: Any, text: str, recwarn: pytest.WarningsRecorder
) -> None:
    resolve_chat_template(None, make(text, **CHATML_TOKENS), "the model")
    assert not recwarn.list


def test_the_date_of_today(make: Any) -> None:
    text = "{{ strftime_now('%Y') }}" + CHATML
    tokenizer = make(text, **CHATML_TOKENS)
    template = resolve_chat_template(None, tokenizer, "the model")
    [first, *_] = sglang_prompts(template, None, "An answer.")
    assert first == model_prompts(text, tokenizer, None)[0]


def test_resolve(make: Any) -> None:
    tokenizer = make(SMOLLM2, **CHATML_TOKENS)
    own = ChatTemplate("own", None, {})
    assert resolve_chat_template(own, tokenizer, "m") is own
    assert resolve_chat_template("gemma-it", tokenizer, "m") is get_chat_template("gemma-it")
    derived = resolve_chat_template(None, tokenizer, "m")
    assert derived == resolve_chat_template(SMOLLM2, tokenizer, "m")
    assert resolve_chat_template(CHATML, tokenizer, "m").default_system_prompt is None
    for wrong in ("chatlm", 3):
        with pytest.raises(ChatTemplateError, match=r"chat_template=.*chatml.*llama-3-instruct"):
            resolve_chat_template(wrong, tokenizer, "m")  # type: ignore[arg-type]
