"""A batch of prompts through the engine alone, without SGLang."""

from sf_local import Engine, SamplingParams

prompts = ["The sun is", "Water boils at", "The largest ocean is"]
with Engine.from_source("demo", progress=True) as engine:
    params = SamplingParams(max_new_tokens=24, temperature=0)
    for prompt, handle in [(p, engine.submit(p, params)) for p in prompts]:
        print(repr(prompt + handle.result().text))
