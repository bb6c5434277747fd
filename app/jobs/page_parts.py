"""What the report's page is made of: every value escaped, every figure as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from app.figures import dims, number, percent, size

MAX_ROWS = 200
Json = Mapping[str, Any]
_DEEPEST = 6


def text(value: Any) -> str:
    """Any JSON value as escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{text(k)}: {text(v)}" for k, v in list(value.items())[:MAX_ROWS])
    if isinstance(value, list):
        return ", ".join(text(item) for item in value[:MAX_ROWS])
    return escape(str(value)[:2000], quote=True)


def shapes_text(value: Any) -> str:
    """Of each input: image 1×3×224×224."""
    if not isinstance(value, Mapping):
        return text(value)
    return ", ".join(f"{text(name)} {text(dims(shape))}" for name, shape in list(value.items())[:MAX_ROWS])


def part_of(report: Json, name: str) -> Json:
    value = report.get(name)
    return value if isinstance(value, Mapping) else {}


def objects(value: Any) -> list[Json]:
    if isinstance(value, Mapping):
        value = [
            {"name": name, **item} if isinstance(item, Mapping) else {"name": name} for name, item in value.items()
        ]
    return [item for item in value[:MAX_ROWS] if isinstance(item, Mapping)] if isinstance(value, list) else []


def section(title: str, body: str, level: int = 3) -> str:
    return f"<h{level}>{text(title)}</h{level}>{body}" if body else ""


def folded(title: str, body: str) -> str:
    """A section that opens when it is asked to."""
    return f"<details><summary><h3>{text(title)}</h3></summary>{body}</details>" if body else ""


def as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def svg(height: int, label: str, marks: str) -> str:
    """A drawing that scrolls within itself where it is wider than the screen."""
    drawn = f"<svg viewBox='0 0 760 {height}' width='100%' role=img fill=currentColor aria-label='{text(label)}'>"
    return f"<div class=scroll tabindex=0 role=group aria-label='{text(label)}'>{drawn}{marks}</svg></div>"


def hint(words: str, marks: str) -> str:
    """Marks of a drawing that say more where a pointer rests on them; `words` are escaped here."""
    return f"<g><title>{text(words)}</title>{marks}</g>"


def rows_table(value: Any, columns: Mapping[str, str], most: int) -> str:
    rows = [[_cell(name, item.get(name)) for name in columns] for item in objects(value)[:most]]
    return table([*columns.values()], rows)


def _cell(name: str, value: Any) -> Any:
    if name == "share" and as_number(value) is not None:
        return percent(value)
    return Raw(shapes_text(value)) if name == "dims" else value


class Raw(str):
    """HTML already."""

    __slots__ = ()


def facts_table(value: Json, deep: int = 0) -> str:
    """Names and values, with those of a part below it; what there is nothing of is left out."""
    found = "".join(
        f"<dt>{text(str(name).replace('_', ' '))}<dd>{_fact(str(name), item, deep)}"
        for name, item in list(value.items())[:MAX_ROWS]
        if item not in (None, {}, [])
    )
    return f"<dl class=facts>{found}</dl>" if found else ""


def _fact(name: str, value: Any, deep: int) -> str:
    if isinstance(value, Mapping) and deep < _DEEPEST:
        return facts_table(value, deep + 1)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        columns = dict.fromkeys(key for item in value[:MAX_ROWS] for key in item)
        return rows_table(value, {key: str(key) for key in columns}, MAX_ROWS)
    if name.endswith("_bytes") and as_number(value) is not None:
        return size(value)
    if name.endswith("share") and as_number(value) is not None:
        return percent(value)
    return text(value)


def bullets(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return ""
    return "<ul>" + "".join(f"<li>{text(item)}" for item in value[:MAX_ROWS]) + "</ul>"


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls within itself where it is wider than the screen."""
    if not rows:
        return ""
    columns = [any(_is_number(row[i]) for row in rows if i < len(row)) for i in range(len(names))]
    head = "".join(
        f"<th scope=col{' class=n' if is_number else ''}>{text(name.replace('_', ' '))}" if name else "<td>"
        for name, is_number in zip(names, columns, strict=True)
    )
    body = "".join("<tr>" + "".join(_td(value) for value in row) for row in rows)
    return scrolling(f"<thead><tr>{head}<tbody>{body}", names)


def scrolling(inner: str, names: Sequence[str]) -> str:
    label = text("Table: " + ", ".join(name for name in names if name)[:100])
    return f"<div class=scroll tabindex=0 role=group aria-label='{label}'><table>{inner}</table></div>"


def _is_number(value: Any) -> bool:
    return as_number(value) is not None


def _td(value: Any) -> str:
    if isinstance(value, Raw):
        return f"<td>{value}"
    return f"<td class=n>{text(value)}" if _is_number(value) else f"<td>{text(value)}"


def interval_text(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return ""
    return f" [{text(value[0])}, {text(value[1])}]"
