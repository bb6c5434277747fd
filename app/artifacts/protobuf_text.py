"""Protobuf's text format, as far as `config.pbtxt` of Triton Inference Server needs it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


class Word(str):
    """A value of an enum, which stands there without quotes."""


def text_format(message: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Lines of a message: nested mappings are messages, lists are repeated fields."""
    pad = "  " * depth
    for name, value in message.items():
        items = list(value) if isinstance(value, list | tuple) else [value]
        if items and not any(isinstance(item, Mapping) for item in items):
            told = ", ".join(_scalar(item) for item in items)
            yield f"{pad}{name}: [{told}]" if isinstance(value, list | tuple) else f"{pad}{name}: {told}"
            continue
        for item in items:
            yield f"{pad}{name} {{"
            yield from text_format(item, depth + 1)
            yield f"{pad}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else _quoted(str(value))


def _quoted(text: str) -> str:
    escaped = re.sub(r'["\\]', lambda found: f"\\{found[0]}", text)
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\{ord(found[0]):03o}", escaped) + '"'
