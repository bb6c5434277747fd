"""How a file is cut into parts. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from app.db.orm import Upload
from app.errors import AppError, conflict
from app.storage.base import StoredPart

MAX_PARTS = 10_000  # of S3
_MIB = 1 << 20
_MAX_LISTED = 20


def part_size(size_bytes: int, preferred: int) -> int:
    """Bytes of each part but the last: `preferred`, or whole MiB enough for at most 10,000 parts."""
    least = -(-size_bytes // MAX_PARTS)
    return max(preferred, -(-least // _MIB) * _MIB)


def part_count(upload: Upload) -> int:
    return max(1, -(-upload.size_bytes // upload.part_size))


def part_bytes(upload: Upload, number: int) -> int:
    """Bytes that part `number` must have. 422 where the session has no such part."""
    count = part_count(upload)
    if not 1 <= number <= count:
        detail = f"Part {number} is not one of the {count} parts of this upload."
        raise AppError("part_number_invalid", "No such part", 422, detail)
    return upload.part_size if number < count else upload.size_bytes - upload.part_size * (count - 1)


def part_size_mismatch(number: int, expected: int, got: int) -> AppError:
    detail = f"Part {number} must have {expected} bytes, and has {got}."
    return AppError("part_size_mismatch", "Wrong size of a part", 422, detail, extra={"expected_bytes": expected})


def check_parts(upload: Upload, parts: Sequence[StoredPart]) -> None:
    """Raise where parts are missing (409) or have another size than they must (422)."""
    there = {part.number: part.size_bytes for part in parts}
    count = part_count(upload)
    missing = [number for number in range(1, count + 1) if number not in there]
    if missing:
        detail = f"{len(missing)} of {count} parts have not arrived: {missing[:_MAX_LISTED]}"
        error = conflict("upload_incomplete", detail, "PUT the missing parts, then complete again.")
        error.extra = {"missing_parts": missing[:1000]}
        raise error
    for number, size in there.items():
        expected = part_bytes(upload, number) if number <= count else 0
        if size != expected:
            raise part_size_mismatch(number, expected, size)
