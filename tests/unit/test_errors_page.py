"""docs/errors.md knows every code that the service and the client give, and none that they do not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What makes an error with a code as its first argument.
_MAKERS = re.compile(r"(AppError|StageFailure|_?failure|[a-z]+_failure|archive_error|conflict|_refusal)")
_CODE = re.compile(r"[a-z]+(_[a-z0-9]+)*")
# The servers in bundles answer in the words of their own protocol (docs/bundles.md).
_ELSEWHERE = ROOT / "workers" / "serving"


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (p for p in (ROOT / folder).rglob("*.py") if _ELSEWHERE not in p.parents or p.name == "proof.py")


def given(path: Path) -> Iterator[str]:
    """The codes of the errors that a module makes."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if not _MAKERS.fullmatch(name):
            continue
        for value in (*call.args[:1], *(k.value for k in call.keywords if k.arg == "code")):
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and _CODE.fullmatch(value.value):
                yield value.value


def told() -> set[str]:
    """The codes in the first column of the page's tables."""
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "errors.md").read_text(), flags=re.MULTILINE)
    return {code for row in rows for code in re.findall(r"`([a-z0-9_]+)`", row)}


def test_every_code_is_told_with_what_mends_it() -> None:
    codes = {code for path in sources("app", "workers") for code in given(path)}
    assert len(codes) > 100
    assert codes - told() == set()


def test_no_code_is_told_that_nothing_gives() -> None:
    proxy = ROOT / "docker" / "proxy" / "Caddyfile"
    files = [*sources("app", "workers", "clients/python/anneal_client"), proxy]
    text = "\n".join(path.read_text() for path in files)
    assert {code for code in told() if f'"{code}"' not in text} == set()
