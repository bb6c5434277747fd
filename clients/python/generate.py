"""Write `anneal_client/models.py`, `reports.py` and `requests.py` from the service's OpenAPI document:

python clients/python/generate.py

A test compares them with what this gives.
"""

from __future__ import annotations

import json
import keyword
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "openapi.json"
REFERENCE = "#/components/schemas/"
SENT = ("OptimizationSpec", "UploadIn")  # with what they refer to: TypedDicts; all others are answers
REPORTS = ("Report", "Comparison")  # with what they refer to: a module of their own

ANSWERS = '''"""What the service answers. Made from openapi.json by `clients/python/generate.py`: do not edit."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from anneal_client.answers import Answer
'''
REQUESTS = '''"""What the service is sent. Made from openapi.json by `clients/python/generate.py`: do not edit."""

from __future__ import annotations

from typing import Any, Literal, Required, TypedDict
'''


def main() -> None:
    for name, text in generated(json.loads(DOCUMENT.read_text(encoding="utf-8"))).items():
        (HERE / "anneal_client" / name).write_text(text, encoding="utf-8")


def generated(document: dict[str, Any]) -> dict[str, str]:
    """The two modules by their file names."""
    schemas: dict[str, Any] = document["components"]["schemas"]
    sent, reports = set(reachable(schemas, SENT)), set(reachable(schemas, REPORTS))
    taken = sent | reports
    answered = [name for name in reachable(schemas, answers_of(document)) if name not in taken and not _is_page(name)]
    models, requests = [ANSWERS], [REQUESTS]
    shared = sorted(sent & {r for name in answered for r in references(schemas[name])})
    if shared:
        models[0] += f"from anneal_client.requests import {', '.join(map(client_name, shared))}\n"
    models += [answer_class(name, schemas[name]) for name in sorted(answered)]
    requests += [request_class(name, schemas[name]) for name in sorted(sent)]
    written = [ANSWERS, *(answer_class(name, schemas[name]) for name in sorted(reports - sent))]
    modules = {"models.py": models, "reports.py": written, "requests.py": requests}
    return {name: formatted("\n\n".join(parts)) for name, parts in modules.items()}


def answers_of(document: dict[str, Any]) -> list[str]:
    """The schemas of all answers: of successes, of errors, and what webhooks bring."""
    operations = [o for path in (*document["paths"].values(), *document["webhooks"].values()) for o in path.values()]
    found = [r for operation in operations for r in references(operation.get("responses"))]
    return [*found, *(r for hook in document["webhooks"].values() for r in references(hook))]


def reachable(schemas: dict[str, Any], names: Any) -> list[str]:
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            waiting += references(schemas[name])
    return list(found)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(target := node.get("$ref"), str) and target.startswith(REFERENCE):
            yield target.removeprefix(REFERENCE)
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def answer_class(name: str, schema: dict[str, Any]) -> str:
    fields = schema.get("properties", {})
    for field in fields:
        if hasattr(dict, field) or keyword.iskeyword(field):
            raise SystemExit(f"{name}.{field} cannot be an attribute of a dict.")
    required = schema.get("required", ())
    defaults = {n: f.get("default", empty(f)) for n, f in fields.items() if n not in required}
    defaults = {n: value for n, value in defaults.items() if value is not None}  # None follows from the annotation
    base = f"Answer, defaults={defaults!r}" if defaults else "Answer"
    lines = [f"    {n}: {python_type(f)}{_comment(f)}" for n, f in fields.items()]
    return "\n".join([f"class {client_name(name)}({base}):", *_docstring(schema), *(lines or ["    pass"])])


def request_class(name: str, schema: dict[str, Any]) -> str:
    # The spec may be given in two halves (`submit(spec, **fields)`), so neither of them must be whole.
    required = () if name == "OptimizationSpec" else schema.get("required", ())
    lines = [
        f"    {n}: {f'Required[{python_type(f)}]' if n in required else python_type(f)}{_comment(f)}"
        for n, f in schema.get("properties", {}).items()
    ]
    head = f"class {client_name(name)}(TypedDict, total=False):"
    return "\n".join([head, *_docstring(schema), *(lines or ["    pass"])])


def _comment(field: dict[str, Any]) -> str:
    text = " ".join(field.get("description", "").split())
    return f"  # {text}" if text and len(text) < 75 else ""


def _docstring(schema: dict[str, Any]) -> list[str]:
    text = schema.get("description", "").strip()
    if not text:
        return []
    return [*textwrap.indent(f'"""{text}"""', "    ").splitlines(), ""]


def python_type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return client_name(schema["$ref"].removeprefix(REFERENCE))
    if "anyOf" in schema:
        return " | ".join(python_type(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return f"Literal[{', '.join(json.dumps(value) for value in values)}]"
    match schema.get("type"):
        case "array":
            return f"list[{python_type(schema.get('items', {}))}]"
        case "object":
            values = schema.get("additionalProperties", True)
            return f"dict[str, {python_type(values) if isinstance(values, dict) else 'Any'}]"
        case "string":
            return "datetime" if schema.get("format") == "date-time" else "str"
        case kind:
            return {"integer": "int", "number": "float", "boolean": "bool", "null": "None"}.get(str(kind), "Any")


def empty(schema: dict[str, Any]) -> Any:
    return {"array": [], "object": {}}.get(schema.get("type", ""))


def client_name(name: str) -> str:
    return name.removesuffix("Out")


def _is_page(name: str) -> bool:
    return name.endswith("Page")


def formatted(text: str) -> str:
    """As the linter wants it, without the imports that nothing uses."""
    name = ["--stdin-filename", str(HERE / "anneal_client" / "models.py"), "-"]
    for command in (["check", "--fix", "--quiet", "--select", "F401"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, *name]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    main()
