"""JSON schemas as llguidance gets them: what it ignores, gets wrong or crashes on is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from sf_local.errors import GrammarError
from sf_local.grammar.limits import MAX_PATTERNS, Refused, as_json, shown
from sf_local.grammar.regex import RegexWriter

MAX_PATTERN_PROPERTIES = 64  # of a schema; all pairs are compared
MAX_PROPERTIES = 1_000  # of one object; time grows with the square
MAX_MULTIPLE = 100_000  # remainders that a multipleOf distinguishes
MAX_SCHEMA_LEVELS = 512  # about 5 KiB of stack each
MAX_BOUND = 2**63 - 1024  # of a number; the largest float that fits in 64 bits
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
REFUSED_KEYWORDS = {
    "not": "state what is allowed instead",
    "if": "use anyOf",
    "then": "use anyOf",
    "else": "use anyOf",
    "uniqueItems": "check the list afterwards",
    "contains": "check the list afterwards",
    "minContains": "check the list afterwards",
    "maxContains": "check the list afterwards",
    "dependentRequired": "use anyOf",
    "dependentSchemas": "use anyOf",
    "dependencies": "use anyOf",
    "propertyNames": "use patternProperties and additionalProperties=false",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "x-guidance": "the layout is fixed",
}
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
_COMBINATIONS = frozenset(("allOf", "anyOf", "oneOf", "$ref"))
_OBJECT_KEYWORDS = frozenset(
    ("properties", "patternProperties", "additionalProperties", "required", "minProperties",
     "maxProperties")
)  # fmt: skip
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))


def schema_text(schema: object) -> str:
    if isinstance(schema, str):
        return schema
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        try:
            schema = schema.model_json_schema()
        except Exception as error:  # pydantic has several
            raise GrammarError(f"json_schema has no JSON form: {error}") from error
    if not isinstance(schema, (bool, Mapping)):
        raise GrammarError(
            "json_schema must be JSON text, a dict or a pydantic model class, not "
            f"{type(schema).__name__}."
        )
    try:
        return json.dumps(schema if isinstance(schema, bool) else dict(schema), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"json_schema cannot be written as JSON: {error}.") from None
    except RecursionError:
        raise GrammarError("json_schema is nested too deeply. Flatten it.") from None


def schema_grammar(text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise Refused(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise Refused(f"is not JSON: {error}.") from None
    return as_json({"grammars": [{"json_schema": checked_schema(schema)}]})


def _refuse_constant(name: str) -> None:
    raise Refused(f"is not JSON: it holds {name}.")


def checked_schema(schema: Any) -> dict[str, Any]:
    """`schema` as llguidance gets it."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _SchemaCheck(schema).run()
    return {**schema, "x-guidance": JSON_STYLE}


class _SchemaCheck:
    """Refuses what llguidance ignores, gets wrong or crashes on, by name and path.

    Rewrites what has an equal that llguidance reads: regexes, numbers beyond its precision, and
    oneOf whose alternatives exclude each other.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        draft = str(root.get("$schema")) if isinstance(root, dict) else ""
        self._id_keyword = "id" if "draft-04" in draft else "$id"  # changes what $ref refers to
        self._num_levels = 0
        self._num_pattern_properties = 0
        self._multiple: Fraction | None = None  # least common multiple of all multipleOf
        self._regexes = RegexWriter()
        self._pending: list[tuple[Any, str]] = [(root, "#")]
        self._seen = {id(root)}
        self._checked: set[int] = set()
        self._num_patterns: dict[int, int] = {}  # by id of schema

    def run(self) -> None:
        """Check everything that the root refers to."""
        for schema, path in self._pending:  # grows meanwhile
            self._num_levels += self._check_tree(schema, path)
            # llguidance follows references depth first on the native stack, each one once.
            if self._num_levels > MAX_SCHEMA_LEVELS:
                raise Refused(
                    "has too many schemas nested or referring to each other (more than "
                    f"{MAX_SCHEMA_LEVELS} levels). Split it."
                )
        if self._most_patterns(self._root) > MAX_PATTERNS:
            raise Refused(
                f"may combine more than {MAX_PATTERNS} patterns for one text, by allOf or $ref. "
                "Join them."
            )
        self._close_objects()

    def _close_objects(self) -> None:
        """Forbid other properties than those listed, where nothing else has a say in them.

        A model would go on inventing keys. SGLang's server forbids them as well.
        """
        todo, seen, closable = [(self._root, False)], set[tuple[int, bool]](), []
        while todo:
            schema, is_combined = todo.pop()
            if not isinstance(schema, dict) or (id(schema), is_combined) in seen:
                continue
            seen.add((id(schema), is_combined))
            parts = [(key, child) for key, _, child in _subschemas(schema)]
            if "$ref" in schema:
                parts.append(("$ref", self._resolve(schema["$ref"], "#")))
            combined = [child for key, child in parts if key in _COMBINATIONS]
            todo += [(child, False) for key, child in parts if key not in _COMBINATIONS]
            is_mixed = bool(_OBJECT_KEYWORDS.intersection(schema))
            is_mixed |= sum(key == "allOf" for key, _ in parts) > 1
            todo += [(child, is_combined or is_mixed) for child in combined]
            if not combined and not is_combined and _lists_all(schema):
                closable.append(schema)
        for schema in closable:
            if (id(schema), True) not in seen:
                schema["additionalProperties"] = False

    def _check_tree(self, schema: Any, path: str) -> int:
        """Check `schema` and what lies in it; returns how deep it is nested."""
        todo, depth = [(schema, path, 1)], 0
        while todo:
            schema, path, level = todo.pop()
            depth = max(depth, level)
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, dict):
                raise Refused(f"has {shown(repr(schema))} at {path}; a schema is an object.")
            if id(schema) not in self._checked:  # a reference may lead inside of another tree
                self._checked.add(id(schema))
                self._check_schema(schema, path)
            todo += [(child, f"{path}/{at}", level + 1) for _, at, child in _subschemas(schema)]
        return depth

    def _check_schema(self, schema: dict[str, Any], path: str) -> None:
        for keyword in schema:
            if keyword in REFUSED_KEYWORDS:
                advice = REFUSED_KEYWORDS[keyword]
                raise Refused(f"has {keyword} at {path}, which is not supported; {advice}.")
        if schema is not self._root and self._id_keyword in schema:
            raise Refused(
                f"has {self._id_keyword} at {path}, which is not supported below the top."
            )
        if "additionalItems" in schema and "prefixItems" in schema:
            raise Refused(f"has prefixItems and additionalItems at {path}; use items instead.")
        if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
            raise Refused(
                f"has the format {shown(schema['format'])} at {path}; supported are "
                f"{', '.join(sorted(_FORMATS))}. Use a pattern, or remove it."
            )
        self._check_object(schema, path)
        self._rewrite_patterns(schema, path)
        self._check_numbers(schema, path)
        if "$ref" in schema:
            self._follow(schema["$ref"], path)
        if "oneOf" in schema and "anyOf" not in schema and self._is_tagged(schema["oneOf"], path):
            renamed = [("anyOf" if k == "oneOf" else k, v) for k, v in schema.items()]
            schema.clear()
            schema.update(renamed)

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        properties, required = schema.get("properties"), schema.get("required")
        required = {str(name) for name in required} if isinstance(required, list) else set()
        names = required.union(properties if isinstance(properties, dict) else ())
        if len(names) > MAX_PROPERTIES:
            raise Refused(
                f"has {len(names):,} properties at {path}; at most {MAX_PROPERTIES:,} are "
                "supported. Use additionalProperties."
            )
        # llguidance may repeat a key that is not named, and would count it twice.
        least = schema.get("minProperties")
        if isinstance(least, int) and least > max(len(required), 1):
            raise Refused(
                f"has minProperties={least} at {path}, which is supported up to the number of "
                "required properties. Name them."
            )

    def _rewrite_patterns(self, schema: dict[str, Any], path: str) -> None:
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = self._rewritten(schema["pattern"], f"{path}/pattern")
        properties = schema.get("patternProperties")
        if isinstance(properties, dict):
            self._num_pattern_properties += len(properties)
            if self._num_pattern_properties > MAX_PATTERN_PROPERTIES:
                raise Refused(f"has more than {MAX_PATTERN_PROPERTIES} patternProperties.")
            path += "/patternProperties"
            schema["patternProperties"] = {
                self._rewritten(pattern, path): child for pattern, child in properties.items()
            }

    def _rewritten(self, pattern: str, path: str) -> str:
        try:
            return self._regexes.write(pattern, is_search=True)
        except Refused as error:
            raise Refused(f"has {shown(pattern)} at {path}, which {error}") from None

    def _check_numbers(self, schema: dict[str, Any], path: str) -> None:
        for number in _numbers([schema.get("const"), schema.get("enum")]):
            if abs(number) > 2**53:
                raise Refused(f"has the constant {shown(str(number))} at {path}, above 2**53.")
        for keyword, inward in _BOUNDS.items():
            bound = schema.get(keyword)
            if isinstance(bound, (int, float)) and not isinstance(bound, bool):
                schema[keyword] = _representable(bound, inward, f"{path}/{keyword}")
        multiple = schema.get("multipleOf")
        if isinstance(multiple, (int, float)) and 0 < multiple < math.inf:
            self._add_multiple(Fraction(str(multiple)), path)

    def _add_multiple(self, new: Fraction, path: str) -> None:
        old = self._multiple or new
        self._multiple = Fraction(
            math.lcm(old.numerator, new.numerator), math.gcd(old.denominator, new.denominator)
        )
        digits = self._multiple
        while digits.denominator != 1:
            digits *= 10
        if digits > MAX_MULTIPLE:
            raise Refused(
                f"has a multipleOf at {path} that is too fine, alone or with the others: the "
                f"digits of their least common multiple may go up to {MAX_MULTIPLE:,}."
            )

    def _follow(self, reference: object, path: str) -> None:
        target = self._resolve(reference, path)
        if id(target) not in self._seen:
            self._seen.add(id(target))
            self._pending.append((target, str(reference)))

    def _resolve(self, reference: object, path: str) -> Any:
        target = self._root
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

    def _most_patterns(self, schema: Any) -> int:
        """At most how many regexes llguidance intersects for one text, as it merges `schema`."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._num_patterns:
            self._num_patterns[id(schema)] = 0  # what a loop adds; llguidance refuses those
            most = {"": ("pattern" in schema) + ("format" in schema)}
            merged = (
                self._most_patterns(self._resolve(schema["$ref"], "#")) if "$ref" in schema else 0
            )
            for keyword, _, child in _subschemas(schema):
                num = self._most_patterns(child)
                if keyword == "allOf":
                    merged += num
                else:
                    most[keyword] = max(most.get(keyword, 0), num)
            merged += sum(most.pop(k, 0) for k in ("anyOf", "oneOf", "patternProperties"))
            self._num_patterns[id(schema)] = merged + max(most.values())
        return self._num_patterns[id(schema)]

    def _is_tagged(self, options: Any, path: str) -> bool:
        """Whether all options are objects that differ in the constants of one required property."""
        if not isinstance(options, list):
            return False
        tags = [self._tags(option, path) for option in options]
        names = set.intersection(*map(set, tags)) if tags else set()
        return any(
            sum(len(tag[name]) for tag in tags) == len(set().union(*(tag[name] for tag in tags)))
            for name in names
        )

    def _tags(self, option: Any, path: str) -> dict[str, set[str]]:
        """The strings that an object's required properties may be, for those that list them."""
        if isinstance(option, dict) and set(option) == {"$ref"}:
            option = self._resolve(option["$ref"], path)
        if not isinstance(option, dict) or option.get("type") != "object":
            return {}
        properties, required = option.get("properties"), option.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return {}
        tags = {name: _strings(properties[name]) for name in required if name in properties}
        return {name: strings for name, strings in tags.items() if strings}


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The schemas directly inside `schema`: keyword, path, schema. Not $defs, but by reference."""
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties") and isinstance(value, dict):
            yield from ((keyword, f"{keyword}/{name}", child) for name, child in value.items())
        elif keyword in _LISTS and isinstance(value, list):
            yield from ((keyword, f"{keyword}/{i}", child) for i, child in enumerate(value))
        elif keyword in ("items", "additionalItems", "additionalProperties"):
            yield keyword, keyword, value


def _lists_all(schema: dict[str, Any]) -> bool:
    """Whether `schema` lists properties, all that it requires among them, and says no more."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    if schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}:
        return False
    return bool(properties) and properties.keys() >= set(map(str, required))


def _strings(schema: Any) -> set[str]:
    """The strings that `schema` allows, if it lists them and nothing else."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return set()
    return set(values)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _representable(bound: float, inward: int, path: str) -> float:
    """The nearest bound that llguidance represents and that allows no more than `bound`."""
    if bound * inward > MAX_BOUND:
        raise Refused(f"has {shown(str(bound))} at {path}, beyond 64 bits.")
    if abs(bound) > MAX_BOUND:
        return -inward * MAX_BOUND
    near = float(bound)
    if near == bound:
        return bound
    is_inside = (near > bound) == (inward > 0)
    return int(near if is_inside else math.nextafter(near, inward * math.inf))
