"""A model calls a function, and answers with what that returned.

The demo model was not trained to call functions, and its chat template does not write them. So it
is given one that does, in the form of Hermes and Qwen, and its first answer must be a call. Models
that were trained for it, such as Hermes or Qwen, need neither: leave out chat_template and
tool_choice.
"""

from sf_local import Engine, SamplingParams

TEMPLATE = """
{%- if tools %}{{ "<|im_start|>system\nYou may call functions:\n<tools>\n" }}
{%- for tool in tools %}{{ tool | tojson + "\n" }}{% endfor %}
{{- '</tools>\nWrite a call as <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>' }}
{{- "<|im_end|>\n" }}{% endif %}
{%- for message in messages %}
{%- set is_result = message.role == "tool" %}
{{- "<|im_start|>" + ("user" if is_result else message.role) + "\n" }}
{{- "<tool_response>\n" if is_result }}{{ message.content }}
{{- "\n</tool_response>" if is_result }}
{%- for call in message.tool_calls or [] %}
{{- "<tool_call>\n" + call.function | tojson + "\n</tool_call>" }}{% endfor %}
{{- "<|im_end|>\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""


def population(country: str) -> str:
    """How many people live in a country."""
    return {"France": "68 million", "Italy": "59 million"}.get(country, "unknown")


functions = {"population": population}
messages = [{"role": "user", "content": "How many people live in France?"}]
with Engine.from_source("demo", chat_template=TEMPLATE, progress=True) as engine:

    def ask(tool_choice):
        params = SamplingParams(max_new_tokens=64, temperature=0)
        return engine.chat(messages, params, tools=[population], tool_choice=tool_choice)

    answer = ask({"name": "population"})  # whose arguments follow the function's type hints
    while answer.tool_calls:
        messages += [{"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls}]
        for call in answer.tool_calls:
            result = functions[call.name](**call.arguments)
            print(f"{call.name}({call.arguments}) is {result!r}")
            messages += [{"role": "tool", "tool_call_id": call.id, "content": result}]
        answer = ask("none")  # "auto" is for models that know when they are done
    print(answer.text)
