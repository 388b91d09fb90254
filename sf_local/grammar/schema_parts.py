"""Reading JSON schemas: what lies in one, what a $ref refers to, which values it names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from sf_local.grammar.limits import Refused, shown

_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
MAX_BOUND = 2**63 - 1024  # the largest float that fits in llguidance's 64-bit integers

_WRAPPER = frozenset(("type", "name", "description", "strict", "schema"))


def unwrapped(schema: Any) -> Any:
    """The schema in one of OpenAI's response formats, or in its json_schema; else `schema`.

    They are `{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}`, its inner part,
    `{"type": "json_schema", "name": ..., "schema": ...}`, and the same with the type json_object.
    """
    if not isinstance(schema, dict):
        return schema
    inner = schema.get("json_schema") if schema.get("type") == "json_schema" else None
    inner = inner if isinstance(inner, dict) else schema
    if not isinstance(inner.get("schema"), (dict, bool)) or not inner.keys() <= _WRAPPER:
        return schema
    is_wrapper = inner.get("type", "json_schema") in ("json_schema", "json_object")
    return inner["schema"] if is_wrapper else schema


def subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The schemas directly inside `schema`, as (keyword, path, schema).

    Those in $defs are left out: they count only if something refers to them.
    """
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties") and isinstance(value, dict):
            yield from ((keyword, f"{keyword}/{name}", child) for name, child in value.items())
        elif keyword in _LISTS and isinstance(value, list):
            yield from ((keyword, f"{keyword}/{i}", child) for i, child in enumerate(value))
        elif keyword in ("items", "additionalItems", "additionalProperties"):
            yield keyword, keyword, value


def resolve(root: Any, reference: object, path: str) -> Any:
    """The schema in `root` that the $ref at `path` refers to.

    Raises:
        Refused: it refers to another document, or to nothing.
    """
    target = root
    if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
        raise Refused(
            f"has $ref {shown(str(reference))} at {path}; only #/... of the same schema is "
            "supported. Copy the schema into $defs."
        )
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(key)] if isinstance(target, list) else target[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise Refused(
                f"has $ref {shown(reference)} at {path}, which leads nowhere. Define it."
            ) from None
    return target


def is_tagged(root: Any, options: Any, path: str) -> bool:
    """Whether all options are objects that differ in the constants of one required property."""
    if not isinstance(options, list):
        return False
    tags = [_tags(root, option, path) for option in options]
    names = set.intersection(*map(set, tags)) if tags else set()
    return any(
        sum(len(tag[name]) for tag in tags) == len(set().union(*(tag[name] for tag in tags)))
        for name in names
    )


def _tags(root: Any, option: Any, path: str) -> dict[str, set[str]]:
    """The strings that an object's required properties may be, for those that list them."""
    if isinstance(option, dict) and set(option) == {"$ref"}:
        option = resolve(root, option["$ref"], path)
    if not isinstance(option, dict) or option.get("type") != "object":
        return {}
    properties, required = option.get("properties"), option.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    tags = {name: _strings(properties[name]) for name in required if name in properties}
    return {name: strings for name, strings in tags.items() if strings}


def _strings(schema: Any) -> set[str]:
    """The strings that `schema` allows, if it lists them and nothing else."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return set()
    return set(values)


def lists_all(schema: dict[str, Any]) -> bool:
    """Whether `schema` lists properties, with all required ones, and allows others by default."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    if schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}:
        return False
    return bool(properties) and properties.keys() >= set(map(str, required))


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)


def representable(bound: float, inward: int, path: str) -> float:
    """The nearest bound that llguidance can represent and that allows no more than `bound`.

    `inward` is 1 for a lower bound and -1 for an upper one.

    Raises:
        Refused: a 64-bit number cannot satisfy it.
    """
    if bound * inward > MAX_BOUND:
        raise Refused(f"has {shown(str(bound))} at {path}, beyond 64 bits.")
    if abs(bound) > MAX_BOUND:
        return -inward * MAX_BOUND
    near = float(bound)
    if near == bound:
        return bound
    is_inside = (near > bound) == (inward > 0)
    return int(near if is_inside else math.nextafter(near, inward * math.inf))
