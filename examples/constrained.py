"""Answer from a list, as a boolean, and as JSON that a pydantic model reads."""

from typing import Literal

import sglang as sgl
from common import checked, open_backend
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=30)
    country: str = Field(max_length=30)
    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]


@sgl.function
def describe(s, city):
    s += f"{city} is a large city. {city} lies on the continent of"
    s += sgl.gen("continent", choices=[" Asia", " Africa", " Europe"])
    s += ". It is a capital, True or False? " + sgl.gen("capital", dtype=bool, temperature=0)
    s += f".\n{city} as JSON: " + sgl.gen("json", json_schema=City, temperature=0)


with open_backend():
    for state in describe.run_batch([{"city": "Paris"}, {"city": "Tokyo"}]):
        checked(state)
        print(state["continent"], state["capital"], City.model_validate_json(state["json"]))
