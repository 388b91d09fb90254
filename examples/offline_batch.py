"""Prompts through the engine alone, without SGLang: a list, and any number with progress."""

from sf_local import Engine, SamplingParams

prompts = ["The sun is", "Water boils at", "The largest ocean is"]
with Engine.from_source("demo", progress=True) as engine:
    params = SamplingParams(max_new_tokens=24, temperature=0)
    for prompt, answer in zip(prompts, engine.generate(prompts, params), strict=True):
        print(repr(prompt + answer.text))

    countries = ["France", "Italy", "Egypt", "Japan"]  # or any number, such as a file's lines
    chats = ([{"role": "user", "content": f"What is the capital of {c}?"}] for c in countries)
    for answer in engine.map(chats, params):  # as they complete, with a progress bar
        print(f"{countries[answer.index]}: {answer.text}")
