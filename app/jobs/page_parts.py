"""What the report's page is made of: every value escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MAX_ROWS = 200
Json = Mapping[str, Any]


def text(value: Any) -> str:
    """Any JSON value as escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{text(k)}: {text(v)}" for k, v in list(value.items())[:MAX_ROWS])
    if isinstance(value, list):
        return ", ".join(text(item) for item in value[:MAX_ROWS])
    return escape(str(value)[:2000], quote=True)


def part_of(report: Json, name: str) -> Json:
    value = report.get(name)
    return value if isinstance(value, Mapping) else {}


def objects(value: Any) -> list[Json]:
    if isinstance(value, Mapping):
        value = [
            {"name": name, **item} if isinstance(item, Mapping) else {"name": name} for name, item in value.items()
        ]
    return [item for item in value[:MAX_ROWS] if isinstance(item, Mapping)] if isinstance(value, list) else []


def section(title: str, body: str) -> str:
    return f"<h2>{text(title)}</h2>{body}" if body else ""


def as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def svg(height: int, label: str, marks: str) -> str:
    return f"<svg viewBox='0 0 760 {height}' width='100%' role=img aria-label='{text(label)}'>{marks}</svg>"


def rows_table(value: Any, columns: Mapping[str, str], most: int) -> str:
    return table([*columns.values()], [[item.get(name) for name in columns] for item in objects(value)[:most]])


def facts_table(value: Json) -> str:
    return table(["", ""], [[str(name).replace("_", " "), item] for name, item in list(value.items())[:MAX_ROWS]])


def bullets(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return ""
    return "<ul>" + "".join(f"<li>{text(item)}" for item in value[:MAX_ROWS]) + "</ul>"


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{text(name.replace('_', ' '))}" for name in names) if any(names) else ""
    body = ""
    for row in rows:
        cells = (
            f"<td class=n>{text(v)}" if isinstance(v, int | float) and not isinstance(v, bool) else f"<td>{text(v)}"
            for v in row
        )
        body += "<tr>" + "".join(cells)
    return f"<table><tr>{head}{body}</table>"


def interval_text(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return ""
    return f" [{text(value[0])}, {text(value[1])}]"
