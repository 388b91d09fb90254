"""JSON schemas, checked and rewritten for llguidance.

Keywords that llguidance ignores, gets wrong or crashes on are refused, with their path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from sf_local.errors import GrammarError
from sf_local.grammar.formats import FORMAT_PATTERNS
from sf_local.grammar.limits import MAX_PATTERNS, Refused, as_json, shown
from sf_local.grammar.pattern_properties import (
    ONE_SPELLING,
    has_other_keys,
    named_keys,
    rewrite_pattern_properties,
)
from sf_local.grammar.regex import RegexWriter
from sf_local.grammar.schema_parts import (
    is_tagged,
    lists_all,
    numbers,
    representable,
    resolve,
    subschemas,
    unwrapped,
)

MAX_PATTERN_PROPERTIES = 64  # in a whole schema; llguidance compares all pairs
MAX_PROPERTIES = 1_000  # of one object; llguidance's time grows with the square
MAX_MULTIPLE = 100_000  # least common multiple of all multipleOf, without its decimal point
MAX_SCHEMA_LEVELS = 512  # each takes about 5 KiB of llguidance's stack
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


def schema_text(schema: object) -> str:
    """The JSON text of a schema given as text, a bool, a dict or a type that pydantic knows.

    Raises:
        GrammarError: it is none of these, or has no JSON form.
    """
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, (bool, Mapping)):
        schema = _schema_of_type(schema)
    try:
        return json.dumps(schema if isinstance(schema, bool) else dict(schema), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"json_schema cannot be written as JSON: {error}.") from None
    except RecursionError:
        raise GrammarError("json_schema is nested too deeply. Flatten it.") from None


def _schema_of_type(of: Any) -> Mapping[str, Any]:
    import pydantic  # takes 0.1 s

    try:
        return pydantic.TypeAdapter(of).json_schema()
    except Exception as error:  # pydantic has several, and a model's own code may raise anything
        if isinstance(of, type):
            raise GrammarError(f"json_schema has no JSON form: {error}") from error
        raise GrammarError(
            "json_schema must be JSON text, a dict, a pydantic model class, or another type that "
            f"pydantic knows, such as list[int], not {type(of).__name__}."
        ) from None


def schema_grammar(text: str) -> str:
    """The JSON text of a schema as llguidance's grammar.

    Raises:
        Refused: it is not JSON, not a schema, or has what is not supported.
    """
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
    """`schema`, checked and rewritten in place, with the layout of our JSON.

    Raises:
        Refused: it is not a schema, or has what is not supported.
    """
    schema = unwrapped(schema)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    checked = _SchemaCheck(schema).run()
    spelling = ONE_SPELLING if any(map(has_other_keys, checked)) else {}
    return {**schema, "x-guidance": JSON_STYLE | spelling}


def _rewrite_format(schema: dict[str, Any]) -> None:
    """Write a format as the pattern that is stricter, beside one of the schema's own."""
    if isinstance(schema.get("format"), str) and schema["format"] in FORMAT_PATTERNS:
        pattern = FORMAT_PATTERNS[schema.pop("format")]
        if "pattern" not in schema:
            schema["pattern"] = pattern
        elif isinstance(others := schema.setdefault("allOf", []), list):
            others.append({"pattern": pattern})


class _SchemaCheck:
    """Refuses what llguidance ignores, gets wrong or crashes on, by name and path.

    Rewrites in place what llguidance can read in another form: regexes, bounds beyond its
    precision, and a oneOf whose alternatives exclude each other.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        draft = str(root.get("$schema")) if isinstance(root, dict) else ""
        self._id_keyword = "id" if "draft-04" in draft else "$id"  # it would redirect each $ref
        self._num_levels = 0
        self._num_pattern_properties = 0
        self._multiple: Fraction | None = None  # least common multiple of all multipleOf
        self._regexes = RegexWriter()
        self._pending: list[tuple[Any, str]] = [(root, "#")]
        self._seen = {id(root)}
        self._checked: dict[int, dict[str, Any]] = {}
        self._num_patterns: dict[int, int] = {}  # what _most_patterns found, by id of schema

    def run(self) -> Iterable[dict[str, Any]]:
        """Check the root and all that it refers to; returns the schemas in it.

        Raises:
            Refused: something in it is not supported.
        """
        for schema, path in self._pending:  # it grows while references are followed
            self._num_levels += self._check_tree(schema, path)
            # llguidance follows each reference once, depth first, on the native stack.
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
        return self._checked.values()

    def _close_objects(self) -> None:
        """Forbid properties that a schema does not list, unless it is combined with others.

        A model would go on inventing keys. SGLang's server forbids them as well. Schemas that
        allOf, anyOf, oneOf or $ref combine stay open: one may allow what another lists.
        """
        todo, seen, closable = [(self._root, False)], set[tuple[int, bool]](), []
        while todo:
            schema, is_combined = todo.pop()
            if not isinstance(schema, dict) or (id(schema), is_combined) in seen:
                continue
            seen.add((id(schema), is_combined))
            parts = [(key, child) for key, _, child in subschemas(schema)]
            if "$ref" in schema:
                parts.append(("$ref", resolve(self._root, schema["$ref"], "#")))
            combined = [child for key, child in parts if key in _COMBINATIONS]
            todo += [(child, False) for key, child in parts if key not in _COMBINATIONS]
            is_mixed = bool(_OBJECT_KEYWORDS.intersection(schema))
            is_mixed |= sum(key == "allOf" for key, _ in parts) > 1
            todo += [(child, is_combined or is_mixed) for child in combined]
            if not combined and not is_combined and lists_all(schema):
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
            if id(schema) not in self._checked:  # a $ref may lead into a tree that was checked
                self._checked[id(schema)] = schema
                self._check_schema(schema, path)
            todo += [(child, f"{path}/{at}", level + 1) for _, at, child in subschemas(schema)]
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
        _rewrite_format(schema)
        self._rewrite_patterns(schema, path)
        self._check_numbers(schema, path)
        if "$ref" in schema:
            self._follow(schema["$ref"], path)
        if (
            "oneOf" in schema
            and "anyOf" not in schema
            and is_tagged(self._root, schema["oneOf"], path)
        ):
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
        # llguidance may repeat a key that the schema does not name, and would count it twice.
        least = schema.get("minProperties")
        if isinstance(least, int) and least > max(len(required), 1):
            raise Refused(
                f"has minProperties={least} at {path}, which is supported up to the number of "
                "required properties. Name them."
            )

    def _rewrite_patterns(self, schema: dict[str, Any], path: str) -> None:
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = self._rewritten(schema["pattern"], f"{path}/pattern")
        patterns = schema.get("patternProperties")
        if isinstance(patterns, dict) and isinstance(schema.get("properties", {}), dict):
            self._num_pattern_properties += len(patterns)
            if self._num_pattern_properties > MAX_PATTERN_PROPERTIES:
                raise Refused(f"has more than {MAX_PATTERN_PROPERTIES} patternProperties.")
            path += "/patternProperties"
            rewrite_pattern_properties(schema, path, self._regexes, named_keys(self._root))

    def _rewritten(self, pattern: str, path: str) -> str:
        try:
            return self._regexes.write(pattern, is_search=True)
        except Refused as error:
            raise Refused(f"has {shown(pattern)} at {path}, which {error}") from None

    def _check_numbers(self, schema: dict[str, Any], path: str) -> None:
        for number in numbers([schema.get("const"), schema.get("enum")]):
            if abs(number) > 2**53:
                raise Refused(f"has the constant {shown(str(number))} at {path}, above 2**53.")
        for keyword, inward in _BOUNDS.items():
            bound = schema.get(keyword)
            if isinstance(bound, (int, float)) and not isinstance(bound, bool):
                schema[keyword] = representable(bound, inward, f"{path}/{keyword}")
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
        target = resolve(self._root, reference, path)
        if id(target) not in self._seen:
            self._seen.add(id(target))
            self._pending.append((target, str(reference)))

    def _most_patterns(self, schema: Any) -> int:
        """An upper bound of the number of regexes that llguidance intersects for one text.

        It merges schemas that allOf and $ref combine, and with them their patterns and formats.
        """
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._num_patterns:
            self._num_patterns[id(schema)] = 0  # ends circles, which llguidance refuses
            most = {"": ("pattern" in schema) + ("format" in schema)}
            merged = (
                self._most_patterns(resolve(self._root, schema["$ref"], "#"))
                if "$ref" in schema
                else 0
            )
            for keyword, _, child in subschemas(schema):
                num = self._most_patterns(child)
                if keyword == "allOf":
                    merged += num
                else:
                    most[keyword] = max(most.get(keyword, 0), num)
            merged += sum(most.pop(k, 0) for k in ("anyOf", "oneOf", "patternProperties"))
            self._num_patterns[id(schema)] = merged + max(most.values())
        return self._num_patterns[id(schema)]
