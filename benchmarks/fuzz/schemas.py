"""Values by JSON schema, and whether a value is as one says: as much of both as the OpenAPI document needs."""

from __future__ import annotations

import copy
import random
from typing import Any

Json = dict[str, Any]

_DEEPEST = 6
_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 63, -(1 << 63) - 1, 1e308, -1e308, 1e-320, 0.1, "", " ", "\0", "a\0b",
    "\x1b[2J", "😀", "\ud83d", "a" * 300, "é" * 5000, "../../etc/passwd", "http://127.0.0.1/", "NaN",
    [], {}, [[]], [None], {"": None}, [1] * 300, {"a" * 300: 1},
)  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


class Schemas:
    """Of one document. Seeded by `rng`."""

    def __init__(self, document: Json, rng: random.Random) -> None:
        self._all = document["components"]["schemas"]
        self._rng = rng

    def sample(self, schema: Json, depth: int = 0) -> Any:
        """A value that the schema takes, mostly."""
        schema, rng = self._resolved(schema), self._rng
        if depth > _DEEPEST:
            return None
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return self.sample(rng.choice(schema[choice]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "default" in schema and rng.random() < 0.2:
            return schema["default"]
        kind = schema.get("type")
        if kind == "object" or "properties" in schema:
            return self._object(schema, depth)
        if kind == "array":
            low = int(schema.get("minItems", 0))
            size = rng.randint(low, max(low, min(int(schema.get("maxItems", 3)), 3)))
            return [self.sample(schema.get("items", {}), depth + 1) for _ in range(size)]
        if kind == "integer":
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            return rng.randint(int(low), int(min(schema.get("maximum", low + 100), low + 1000)))
        if kind == "number":
            return round(rng.uniform(float(schema.get("minimum", 0)), float(schema.get("maximum", 100))), 3)
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "string":
            return rng.choice(("a", "name", "model.onnx", "2026-01-01T00:00:00Z", "x" * schema.get("minLength", 1)))
        return rng.choice(_HOSTILE)

    def spoiled(self, value: Any) -> Any:
        """A copy that is wrong in one to three places."""
        value = copy.deepcopy(value)
        for _ in range(self._rng.randint(1, 3)):
            value = self._spoil(value)
        return value

    def problem(self, value: Any, schema: Json, where: str = "body") -> str | None:
        """What of the value is not as the schema says; None where all is."""
        schema = self._resolved(schema)
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                told = [self.problem(value, option, where) for option in schema[choice]]
                return None if None in told else f"{where} is none of them ({told[0]})"
        if "const" in schema and value != schema["const"]:
            return f"{where} is {value!r}"
        if "enum" in schema and value not in schema["enum"]:
            return f"{where} is {value!r}, none of {schema['enum']}"
        kind = schema.get("type")
        kinds = [kind] if isinstance(kind, str) else kind or []
        if kinds and not any(self._is(value, k) for k in kinds):
            return f"{where} is {type(value).__name__}, not {kind}"
        if isinstance(value, dict):
            return self._problem_of_object(value, schema, where)
        if isinstance(value, list) and "items" in schema:
            return next(
                (p for i, v in enumerate(value) if (p := self.problem(v, schema["items"], f"{where}[{i}]"))), None
            )
        return None

    def _problem_of_object(self, value: Json, schema: Json, where: str) -> str | None:
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"{where} lacks {missing}"
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, inner in value.items():
            if name in known:
                told = self.problem(inner, known[name], f"{where}.{name}")
            elif isinstance(more, dict):
                told = self.problem(inner, more, f"{where}.{name}")
            else:
                told = None if more else f"{where} has {name!r}"
            if told:
                return told
        return None

    def _is(self, value: Any, kind: str) -> bool:
        if isinstance(value, bool) and kind in ("integer", "number"):
            return False
        return isinstance(value, _TYPES[kind])

    def _object(self, schema: Json, depth: int) -> Json:
        needed, chance = schema.get("required", ()), 0.3 if depth else 0.4
        found = {
            name: self.sample(inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in needed or self._rng.random() < chance
        }
        more = schema.get("additionalProperties")
        if isinstance(more, dict) and self._rng.random() < 0.5:
            found["more"] = self.sample(more, depth + 1)
        return found

    def _spoil(self, value: Any) -> Any:
        rng = self._rng
        if isinstance(value, dict) and value and rng.random() < 0.8:
            name = rng.choice([*value])
            action = rng.random()
            if action < 0.1:
                del value[name]
            elif action < 0.2:
                value[rng.choice(("unknown", "", "a\0", "x" * 200))] = rng.choice(_HOSTILE)
            else:
                value[name] = self._spoil(value[name])
            return value
        if isinstance(value, list) and value and rng.random() < 0.7:
            at = rng.randrange(len(value))
            value[at] = self._spoil(value[at])
            return value
        return copy.deepcopy(rng.choice(_HOSTILE))

    def _resolved(self, schema: Json) -> Json:
        while "$ref" in schema:
            schema = self._all[schema["$ref"].rsplit("/", 1)[1]]
        if "allOf" in schema and len(schema["allOf"]) == 1:
            return self._resolved(schema["allOf"][0])
        return schema
