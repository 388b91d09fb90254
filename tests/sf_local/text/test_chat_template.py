"""Derived templates are compared with transformers' own rendering, through sglang's interpreter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
import tokenizers
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import ChatTemplate, ChatTemplateStyle, get_chat_template
from tokenizers import decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from sf_local.errors import ChatTemplateError
from sf_local.text.chat_template import derive_chat_template, resolve_chat_template
from sf_local.text.tokenizer import Tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# the parts of Llama 3.2's that write something when there are no tools
LLAMA32 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
TINYLLAMA = r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# the system message is the beginning of the first user message, as in Gemma 3
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '')"
    " + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
SPECIAL_TOKENS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
CHATML_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
LLAMA2_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
LLAMA3_TOKENS = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "add_bos_token": True,
}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """A tokenizer of single bytes with a chat template."""

    def make(chat_template: str | None, **config: Any) -> Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        library = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens(SPECIAL_TOKENS)
        library.save(str(tmp_path / "tokenizer.json"))
        config["chat_template"] = chat_template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer(tmp_path)

    return make


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


def sglang_prompts(template: ChatTemplate, system: str | None, reply: str) -> list[str]:
    backend = Scripted(template, reply)
    state = conversation.run(system, backend=backend)
    state.sync()
    assert state.error() is None
    return backend.prompts


def model_prompts(text: str, tokenizer: Tokenizer, system: str | None) -> list[str]:
    """What transformers renders for the same conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    prompts: list[str] = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        (prompt,), _ = render_jinja_template(
            [messages],
            chat_template=text,
            add_generation_prompt=True,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            date_string="26 Jul 2024",
        )
        prompts.append(prompt)
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
        (TINYLLAMA, LLAMA2_TOKENS, "An answer."),
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
    template = derive_chat_template(tokenizer, "model")
    written = sglang_prompts(template, system, reply)
    expected = model_prompts(text, tokenizer, system)
    if tokenizer.adds_bos:
        assert not any(prompt.startswith(tokenizer.bos_token) for prompt in written)
    assert list(map(tokenizer.encode, written)) == list(
        map(tokenizer.encode, expected)
    )  # one BOS in both


def test_smollm2(make: Any) -> None:
    template = derive_chat_template(make(SMOLLM2, **CHATML_TOKENS), "smollm2")
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
    template = derive_chat_template(make(LLAMA3, **LLAMA3_TOKENS), "llama-3")
    known = get_chat_template("llama-3-instruct")
    assert template.role_prefix_and_suffix == known.role_prefix_and_suffix
    assert template.stop_str == known.stop_str == ("<|eot_id|>",)
    assert template.default_system_prompt is None


def test_tinyllama(make: Any) -> None:
    template = derive_chat_template(make(TINYLLAMA, **LLAMA2_TOKENS), "tinyllama")
    assert template.role_prefix_and_suffix["user"] == ("<|user|>\n", "</s>\n")
    assert template.role_prefix_and_suffix["assistant"] == ("<|assistant|>\n", "</s>\n")
    assert template.stop_str == ("</s>",)


def test_llama2(make: Any) -> None:
    template = derive_chat_template(make(LLAMA2, **LLAMA2_TOKENS), "llama-2")
    known = get_chat_template("llama-2-chat")
    assert template.style is ChatTemplateStyle.LLAMA2
    assert template.role_prefix_and_suffix == known.role_prefix_and_suffix
    assert template.stop_str == ("</s>",)


def test_no_stop_without_a_special_token(make: Any) -> None:
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    template = derive_chat_template(make(text), "plain")
    assert template.role_prefix_and_suffix["user"] == ("user: ", "\n")
    assert template.stop_str == ()


def test_training_marks_and_filters(make: Any) -> None:
    text = CHATML.replace("{% endfor %}", "{% generation %}{% endgeneration %}{% endfor %}")
    text += "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    template = derive_chat_template(make(text, **CHATML_TOKENS), "chatml")
    assert template.role_prefix_and_suffix == get_chat_template("chatml").role_prefix_and_suffix


THINKS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
FORGETS = CHATML.replace("{% for message in messages %}", "{% for message in messages[-1:] %}")
NUMBERS = CHATML.replace("'<|im_start|>' + ", "'<|im_start|>' ~ loop.index ~ ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no chat template in its tokenizer_config.json"),
        (GEMMA, "refuses a conversation of system, .*System role not supported"),
        (CHATML.replace("in messages %", "in messages if message.role != 'system' %"), "system"),
        (THINKS, "expects .*<think>"),
        (FORGETS, "does not write the user message once"),
        (NUMBERS, "is not a prefix and a suffix for each role"),
        ("{% for m in messages %}{{ m.content }}", "is not valid Jinja"),
        ("{{ strftime_now('%d') }}" + CHATML, "'strftime_now' is undefined"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, "refuses a conversation"),
        ("{{ messages.append(1) }}" + CHATML, "refuses a conversation"),
        ("{% for i in range(10000000000) %}{% endfor %}" + CHATML, "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML, "refuses a conversation"),
        ("constant", "does not write the user message once"),
    ],
)
def test_what_cannot_be_expressed(make: Any, text: str | None, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        derive_chat_template(make(text, **CHATML_TOKENS), "the model")
    assert "the model" in str(caught.value)
    assert "chat_template=" in str(caught.value)


def test_resolve(make: Any) -> None:
    tokenizer = make(SMOLLM2, **CHATML_TOKENS)
    own = ChatTemplate("own", None, {})
    assert resolve_chat_template(own, tokenizer, "m") is own
    assert resolve_chat_template("gemma-it", tokenizer, "m") is get_chat_template("gemma-it")
    assert resolve_chat_template(None, tokenizer, "m") == derive_chat_template(tokenizer, "m")
    assert resolve_chat_template(CHATML, tokenizer, "m").default_system_prompt is None
    for wrong in ("chatlm", 3):
        with pytest.raises(ChatTemplateError, match=r"chat_template=.*chatml.*llama-3-instruct"):
            resolve_chat_template(wrong, tokenizer, "m")  # type: ignore[arg-type]


def test_import_is_light() -> None:
    code = (
        "import sys, sf_local.text.chat_template; "
        "print({'transformers', 'sglang'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
