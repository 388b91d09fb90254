"""How well-known models' chat templates write tools and tool calls; the rest of them is left out.

Each is given a user message and one of the assistant, as transformers renders them.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_QWEN = r"""
{%- if tools %}{{- '<|im_start|>system\n<tools>' }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "user" %}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>assistant' }}
{%- if message.reasoning_content %}{{- '\n<think>\n' + message.reasoning_content + '\n</think>\n' }}
{%- endif %}
{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' }}{{- tool_call.function.name }}{{- '", "arguments": ' }}
{{- tool_call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""  # noqa: E501

# Hermes 2 Pro puts the arguments first, and a blank after each call.
_HERMES = r"""
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '{"name": <function-name>, "arguments": <args-dict>}\n' }}{{- '</tool_call><|im_end|>\n' }}
{%- for message in messages %}
{%- if message.role == "user" %}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>assistant' }}
{%- for tool_call in message.tool_calls %}
{{- '\n<tool_call>\n{ "arguments": ' }}{{- tool_call.function.arguments | tojson }}
{{- ', "name": "' }}{{- tool_call.function.name }}{{- '"}\n</tool_call> ' }}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

_LLAMA31 = r"""{{- bos_token }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{%- for message in messages %}
{%- if message.role == "user" %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}
{%- elif message.role == "tool" %}{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
{%- elif message.tool_calls|length > 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}
{%- else %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- if builtin_tools is defined and tool_call.name in builtin_tools %}
{{- "<|python_tag|>" + tool_call.name + ".call(" }}
{%- for arg_name, arg_val in tool_call.arguments | items %}
{{- arg_name + '="' + arg_val + '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}
{%- endfor %}{{- ")<|eom_id|>" }}
{%- else %}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- endif %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501

_MISTRAL = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "user" %}{{- "[AVAILABLE_TOOLS]SPACE" + tools | tojson }}
{{- "[/AVAILABLE_TOOLS][INST]SPACE" + message.content + "[/INST]" }}
{%- else %}{{- "[TOOL_CALLS]SPACE[" }}
{%- for tool_call in message.tool_calls %}
{%- set out = tool_call.function | tojson %}
{{- out[:-1] }}{{- ', "id": "' + tool_call.id + '"}' }}
{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
{%- endfor %}{%- endif %}
{%- endfor %}
"""

_MISTRAL_V11 = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "user" %}{{- "[AVAILABLE_TOOLS]" + tools | tojson }}
{{- "[/AVAILABLE_TOOLS][INST]" + message.content + "[/INST]" }}
{%- else %}
{%- for tool_call in message.tool_calls %}
{{- "[TOOL_CALLS]" + tool_call.function.name + "CALL_ID[ARGS]" }}
{{- tool_call.function.arguments | tojson }}
{%- endfor %}{{- eos_token }}{%- endif %}
{%- endfor %}
"""

TOOL_TEMPLATES = {
    "qwen": _QWEN,
    "hermes": _HERMES,
    "llama3.1": _LLAMA31,
    "mistral_v3": _MISTRAL.replace("SPACE", " "),
    "mistral_nemo": _MISTRAL.replace("SPACE", ""),
    "mistral_v11": _MISTRAL_V11.replace("CALL_ID", '[CALL_ID]" + tool_call.id + "'),
    "mistral_v13": _MISTRAL_V11.replace("CALL_ID", ""),
}
END_MARKERS = "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"


def written_answer(template: str, tools: list[Any], message: dict[str, Any], **kwargs: Any) -> str:
    """What a model has written if `message` is its answer, up to the token that ends it."""
    messages = [{"role": "user", "content": "Hi"}]
    kwargs |= {"tools": tools, "chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    [prompt], _ = render_jinja_template([messages], add_generation_prompt=True, **kwargs)
    [text], _ = render_jinja_template([[*messages, message]], **kwargs)
    assert text.startswith(prompt)
    answer = str(text).removeprefix(prompt).rstrip("\n")
    [end] = [end for end in END_MARKERS if answer.endswith(end)]
    return answer.removesuffix(end)
