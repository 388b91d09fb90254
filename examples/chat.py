"""Messages in, an answer out: whole, as it grows, and as an object."""

from pydantic import BaseModel

from sf_local import Engine, SamplingParams


class Capital(BaseModel):
    city: str
    country: str


params = SamplingParams(max_new_tokens=48, temperature=0)
with Engine.from_source("demo", progress=True) as engine:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = engine.chat(messages, params)
    print(answer.text)
    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "Name one famous building there."},
    ]
    for text in engine.stream_chat(messages, params):
        print(text, end="", flush=True)
    print()
    structured = SamplingParams(max_new_tokens=64, temperature=0, json_schema=Capital)
    print(engine.chat(messages[:1], structured).parsed)
