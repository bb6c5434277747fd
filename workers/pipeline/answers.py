"""What a stage's process left, read by the worker: whatever it is, it may be hostile."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from app.domain.failures import FailureKind, StageFailure
from workers.pipeline.protocol import LOG_FILE, RESULT_FILE

_MOST_RESULT_BYTES = 256 << 20
_MOST_TOLD = 4000  # characters of anything that a failure says
_MOST_LOG_BYTES = 4000
_MOST_NOTES = 1000
_MOST_FILES = 10_000  # of one output
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_CODE = re.compile(r"[a-z0-9_]{1,64}")
_TEXTS = ("detail", "stage", "node", "tensor", "remedy", "reproduce")


def read_result(workspace: Path, stage: str) -> dict[str, Any] | None:
    """What `child.write_result` wrote: {outputs, data, notes, seconds, reusable}. None where there is none. Raises the
    failure that it tells, or `invalid_result`."""
    try:
        raw = read_plain(workspace / RESULT_FILE, _MOST_RESULT_BYTES)
        if raw is None:
            return None
        found = json.loads(raw.replace(rb"\u0000", rb"\ufffd"), parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # half of a character is no text for a database
        failure = _failure(found["failure"]) if "failure" in found else None
        result = {} if failure else _checked(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _invalid(stage, "a result that cannot be read") from error
    if failure is not None:
        raise failure
    return result


def read_plain(path: Path, most: int, *, end: bool = False) -> bytes | None:
    """The bytes of a plain file, `end`: the last `most` ones; None where it is none. Never waits, follows no link.
    Raises ValueError where there are more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        if end:
            file.seek(max(0, found.st_size - most))
        elif found.st_size > most:
            raise ValueError(f"{path.name} has {found.st_size} bytes")
        return file.read(most)


def tail_of_log(workspace: Path) -> str:
    return (read_plain(workspace / LOG_FILE, _MOST_LOG_BYTES, end=True) or b"").decode(errors="replace")


def plain_files(outputs: Path, name: str, most_bytes: int, stage: str) -> list[Path]:
    """The files of one output folder. Raises StageFailure (`invalid_output`) for what is no flat folder of them, for
    too many, and for more than `most_bytes` in sum."""
    if not _NAME.fullmatch(name):
        raise _invalid(stage, f"an output named {name[:100]!r}")
    found: list[Path] = []
    size = 0
    try:
        if not stat.S_ISDIR((outputs / name).lstat().st_mode):
            raise _invalid(stage, f"no folder for its output {name!r}")
        with os.scandir(outputs / name) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    raise _invalid(stage, f"{entry.name[:100]!r}, which is no plain file, among its outputs")
                if not entry.name.isprintable():
                    raise _invalid(stage, f"a file named {entry.name[:100]!r} among its outputs")
                size += entry.stat(follow_symlinks=False).st_size
                found.append(Path(entry.path))
                if len(found) > _MOST_FILES or size > most_bytes:
                    raise _invalid(stage, f"more than {_MOST_FILES} files or {most_bytes >> 20} MiB in its outputs")
    except FileNotFoundError:
        found = []
    if not found:
        raise _invalid(stage, f"no file in its output {name!r}")
    return sorted(found)


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError, TypeError or KeyError for what no stage of ours writes."""
    outputs, data, notes, seconds = (found[name] for name in ("outputs", "data", "notes", "seconds"))
    good = (
        isinstance(outputs, list)
        and all(isinstance(name, str) for name in outputs)
        and isinstance(data, dict)
        and isinstance(notes, list)
        and len(notes) <= _MOST_NOTES
        and all(isinstance(note, dict) and isinstance(note.get("message"), str) for note in notes)
        and isinstance(found["reusable"], bool)
        and math.isfinite(float(seconds))
    )
    if not good:
        raise ValueError("not a result")
    return {**found, "seconds": max(float(seconds), 0.0)}


def _failure(told: dict[str, Any]) -> StageFailure:
    texts = {name: told.get(name) for name in _TEXTS}
    if not isinstance(told["code"], str) or not _CODE.fullmatch(told["code"]):
        raise ValueError("no code")
    if any(not isinstance(text, str | None) for text in texts.values()) or texts["detail"] is None:
        raise ValueError("no text")
    shown = {name: text[:_MOST_TOLD] for name, text in texts.items() if text is not None}
    return StageFailure.from_json({"code": told["code"], "kind": told.get("kind", "model"),
                                   "cacheable": told.get("cacheable", True) is True, **shown})  # fmt: skip


def _invalid(stage: str, what: str) -> StageFailure:
    return StageFailure(
        "invalid_output",
        f"The {stage} stage left {what}.",
        FailureKind.MODEL,
        stage,
        remedy="Check that the model comes from a source that you trust; report this if it does.",
        cacheable=False,
    )


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")
