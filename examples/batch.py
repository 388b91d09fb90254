"""The same two-turn conversation for many inputs, with `run_batch`."""

import sglang as sgl
from common import checked, open_backend


@sgl.function
def country_qa(s, country: str):
    s += sgl.user(f"What is the capital of {country}?")
    s += sgl.assistant(sgl.gen("capital", max_tokens=32, temperature=0))
    s += sgl.user("Name one famous building there.")
    s += sgl.assistant(sgl.gen("building", max_tokens=48, temperature=0))


with open_backend():
    countries = ["France", "Italy", "Egypt", "Japan"]
    states = country_qa.run_batch([{"country": c} for c in countries], progress_bar=True)
    for country, state in zip(countries, map(checked, states), strict=True):
        print(f"{country}: {state['capital']}\n  {state['building']}")
