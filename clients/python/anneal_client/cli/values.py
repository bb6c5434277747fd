"""What options mean: percents, times, sizes, shapes. A value that is none is told with what would be one."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s].*?)?\s*")
_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3, "min": 6e4}
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_MEGABYTES = {
    "b": 1e-6, "kb": 1e-3, "mb": 1.0, "gb": 1e3, "kib": 1024 / 1e6, "mib": 1024**2 / 1e6, "gib": 1024**3 / 1e6,
}  # fmt: skip


def _wrong(text: str, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text[:80]!r} is no {wanted}")


def _quantity(text: str, units: Mapping[str, float], bare: str, wanted: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = (match.group(2) or bare).strip().lower() if match else ""
    if match is None or unit not in units:
        raise _wrong(text, wanted)
    return float(match.group(1)) * units[unit]


def _bounded(
    units: Mapping[str, float], bare: str, wanted: str, low: float, high: float, *, open_low: bool = False
) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = _quantity(text, units, bare, wanted)
        if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
            raise _wrong(text, wanted)
        return value

    return read


percent = _bounded({"%": 1.0}, "%", "percent from 0 to 100, as 1% or 0.5%", 0, 100)
confidence_percent = _bounded({"%": 1.0}, "%", "percent above 50 and below 100, as 95%", 50.0001, 99.9999)
milliseconds = _bounded(_MS, "ms", "time above 0, as 20ms, 500us or 1.5s", 0, math.inf, open_low=True)
budget = _bounded(_SECONDS, "s", "time from 10s to 24h, as 90s, 15m or 2h", 10, 86_400)
measured = _bounded(_SECONDS, "s", "time from 0.1s to 600s, as 3s", 0.1, 600)
patience = _bounded(_SECONDS, "s", "time above 0, as 90s, 15m or 2h", 0, math.inf, open_low=True)
megabytes = _bounded(_MEGABYTES, "mb", "size above 0, as 80MB or 1.5GB", 0, math.inf, open_low=True)
per_second = _bounded({"": 1.0, "/s": 1.0, "qps": 1.0}, "", "rate above 0, as 400 or 400/s", 0, math.inf, open_low=True)
price = _bounded({"": 1.0}, "", "price per hour above 0, as 0.38", 0, 1e6, open_low=True)


def whole(wanted: str, low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\s*\d{1,9}\s*", text) or not low <= int(text) <= high:
            raise _wrong(text, wanted)
        return int(text)

    return read


port = whole("port from 1 to 65535", 1, 65_535)
count = whole("number from 1 to 100000", 1, 100_000)
_batch = whole("batch size from 1 to 4096", 1, 4096)


def batches(text: str) -> list[int]:
    """As 1,8,32."""
    found = [_batch(part) for part in text.split(",")]
    if len(set(found)) != len(found) or len(found) > 16:
        raise _wrong(text, "list of at most 16 batch sizes, each once, as 1,8,32")
    return found


def names(text: str) -> list[str]:
    """As a,b,c."""
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) != len(found):
        raise _wrong(text, "list of names, each once, as fp16,int8")
    return found


def one_of(wanted: str, *allowed: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = names(text)
        for name in found:
            if name not in allowed:
                raise _wrong(name, f"{wanted}; there are {', '.join(allowed)}")
        return found

    return read


def shape(text: str) -> tuple[str, dict[str, list[int]]]:
    """NAME=MIN:OPT:MAX or NAME=ALWAYS, sizes joined by x: input=1x3x224x224:8x3x224x224:32x3x224x224."""
    wanted = "range of shapes, as NAME=1x3x224x224:8x3x224x224:32x3x224x224 (smallest, usual, largest) or NAME=1x128"
    name, equals, told = text.rpartition("=")
    parts = told.split(":")
    if not equals or not name or len(parts) not in (1, 3):
        raise _wrong(text, wanted)
    if not all(re.fullmatch(r"[1-9]\d{0,9}(x[1-9]\d{0,9}){0,15}", part) for part in parts):
        raise _wrong(text, wanted)
    sizes = [[int(size) for size in part.split("x")] for part in (parts if len(parts) == 3 else parts * 3)]
    if len({len(s) for s in sizes}) > 1 or any(not a <= b <= c for a, b, c in zip(*sizes, strict=True)):
        raise _wrong(text, f"{wanted}, of one rank, each size growing from left to right")
    return name, dict(zip(("min", "opt", "max"), sizes, strict=True))


def joint(text: str) -> tuple[str, str]:
    """INPUT=OUTPUT: of the model behind, and of the one before it."""
    own, sign, given = text.partition("=")
    if not (own and sign and given):
        raise _wrong(text, "joint; INPUT=OUTPUT is one")
    return own, given


def target(text: str) -> dict[str, Any]:
    """`cpu`, `cuda`, `auto`; a GPU's compute capability, as 8.9; a hardware id of `anneal capabilities`."""
    if text in ("auto", "cpu", "cuda"):
        return {"device": text}
    if re.fullmatch(r"[1-9][0-9]?\.[0-9]", text):
        return {"compute_capability": text}
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", text):
        raise _wrong(text, "target: cpu, cuda, auto, a compute capability as 8.9, or an id of `anneal capabilities`")
    return {"hardware": text}


def idempotency_key(text: str) -> str:
    if not (text.isascii() and text.isprintable() and 1 <= len(text) <= 255):
        raise _wrong(text, "key: 1 to 255 printable characters of ASCII, as a UUID")
    return text


def existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text[:200]!r}")
    return path


def identifier(prefix: str, kind: str, listed_by: str | None = None) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(rf"{prefix}_[0-9a-zA-Z]{{1,60}}", text):
            raise _wrong(text, f"id of a {kind}; `anneal {listed_by or kind + 's'}` lists them ({prefix}_…)")
        return text

    return read


job_id = identifier("job", "job")


def any_id(*prefixes: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not any(is_id(prefix, text) for prefix in prefixes):
            raise _wrong(text, f"id ({', '.join(f'{prefix}_…' for prefix in prefixes)})")
        return text

    return read


def is_id(prefix: str, text: str) -> bool:
    return re.fullmatch(rf"{prefix}_[0-9a-zA-Z]{{1,60}}", text) is not None
