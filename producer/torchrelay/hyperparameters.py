"""Checks a run's hyperparameters against its recipe's JSON Schema, and says in plain words what a recipe takes.

The schema of a ready recipe comes from its class in `recipes`, that of an author's recipe from the workers, who publish
it. Not here: where the schema is found (`training`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torchrelay_storage.errors import InvalidHyperparameter

Schema = Mapping[str, Any]
"""A JSON Schema, draft 2020-12."""

_WORDS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("a text", "texts"),
    "boolean": ("true or false", "true or false"),
    "object": ("a dict", "dicts"),
    "null": ("none", "none"),
}


def check(recipe: str, schema: Schema, given: Mapping[str, Any], options: Iterable[str] = ()) -> dict[str, Any]:
    """Return the hyperparameters as plain JSON values, with the recipe's defaults filled in.

    Args:
        options: what else the caller could have meant by an unknown name.

    Raises:
        InvalidHyperparameter: one is unknown, missing or refused; the message says which and what is allowed.
    """
    properties: Mapping[str, Schema] = schema.get("properties", {})
    if schema.get("additionalProperties") is False:
        for name in given:
            if name not in properties:
                raise InvalidHyperparameter(str(name), _unknown(recipe, name, properties, options))
    chosen = {name: _plain(name, value) for name, value in given.items()}
    for name in schema.get("required", ()):
        if name not in chosen:
            said = properties.get(name, {}).get("description", "")
            raise InvalidHyperparameter(name, f"recipe {recipe!r} needs {name}{': ' if said else ''}{said}")
    for name, rule in properties.items():
        if name not in chosen and "default" in rule:
            chosen[name] = rule["default"]
    _validate(recipe, schema, chosen)
    return {name: chosen[name] for name in [*properties, *chosen] if name in chosen}


def describe(rule: Schema, schema: Schema | None = None, *, plural: bool = False) -> str:
    """Return in words what a property's schema allows, such as `a whole number from 1 to 64`.

    Args:
        schema: the whole, where the rule may refer to its `$defs`.
    """
    if "$ref" in rule:
        name = str(rule["$ref"]).rpartition("/")[2]
        found = (schema or {}).get("$defs", {}).get(name)
        return describe(found, None, plural=plural) if found is not None else "as the recipe's schema says"
    if "enum" in rule or "const" in rule:
        return _either([repr(value) for value in rule.get("enum", [rule.get("const")])])
    for several in ("anyOf", "oneOf"):
        if several in rule:
            return _either([describe(one, schema, plural=plural) for one in rule[several]])
    kind = rule.get("type")
    if isinstance(kind, list):
        return _either([describe({**rule, "type": one}, schema, plural=plural) for one in kind])
    if kind == "array":
        items = rule.get("items")
        of = f" of {describe(items, schema, plural=True)}" if isinstance(items, Mapping) and items else ""
        return ("lists" if plural else "a list") + of
    if kind not in _WORDS:
        return "anything"
    return _WORDS[kind][plural] + _range(rule)


def _range(rule: Schema) -> str:
    least, most = rule.get("minimum"), rule.get("maximum")
    above, below = rule.get("exclusiveMinimum"), rule.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f" from {least:,} to {most:,}"
    parts = [
        f"{word} {limit:,}"
        for word, limit in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if limit is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _either(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _unknown(recipe: str, name: object, properties: Mapping[str, Schema], options: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), [*properties, *options], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(properties) or 'none'}"
    return f"recipe {recipe!r} has no hyperparameter {str(name)!r}; {hint}"


def _plain(name: str, value: Any) -> Any:
    """The value as JSON has it: tuples as lists, NumPy's numbers as Python's."""
    if isinstance(value, tuple | list):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidHyperparameter(name, f"{name} must be a dict with string keys, not {value!r:.200}")
        return {key: _plain(name, item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidHyperparameter(name, f"{name} must be a finite number, not {value}")
    if value is None or type(value) in (str, bool, int, float):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(name, value.item())
    for kind in (str, bool, int, float):  # members of an enum, and the like
        if isinstance(value, kind):
            return kind(value)
    raise InvalidHyperparameter(
        name, f"{name} cannot be a {type(value).__name__}; pass numbers, texts, booleans, None, or lists and dicts"
    )


def _validate(recipe: str, schema: Schema, chosen: Mapping[str, Any]) -> None:
    from jsonschema import Draft202012Validator  # a tenth of a second to import, for nobody else
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # A registry of its own: the library's would fetch what a schema refers to from the network.
    validator = Draft202012Validator(schema, registry=Registry())
    try:
        found = min(validator.iter_errors(chosen), key=lambda error: list(map(str, error.absolute_path)), default=None)
    except Unresolvable as error:
        raise InvalidHyperparameter(
            "", f"the schema of recipe {recipe!r} refers to what it does not hold: {error}"
        ) from None
    if found is None:
        return
    if not found.absolute_path:
        raise InvalidHyperparameter("", f"recipe {recipe!r} does not take these hyperparameters: {found.message}")
    name = str(found.absolute_path[0])
    rule = schema.get("properties", {}).get(name, {})
    allowed = describe(rule, schema)
    said = f" ({rule['description'].rstrip('.')})" if rule.get("description") else ""
    where = "".join(f"[{part!r}]" for part in list(found.absolute_path)[1:])
    at = f", at {name}{where}" if where else ""
    text = f"{name} must be {allowed}, not {chosen[name]!r:.200}{at}{said}"
    if allowed == "anything" or found.validator not in _SAID:
        text = f"{name} cannot be {chosen[name]!r:.200}: {found.message}{at}{said}"
    raise InvalidHyperparameter(name, text)


# What `describe` puts into words; what else a schema may ask for, the library says.
_SAID = frozenset(
    {"type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "anyOf", "oneOf"}
)
