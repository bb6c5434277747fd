"""`multipart/form-data` with one file, parsed while it streams in: the file goes to disk once, not through a spool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import AppError
from app.http.sink import FileSink

_MAX_PARTS = 16
_MAX_HEADERS = 16
_MAX_HEADER_BYTES = 8 << 10
_MAX_FIELD_BYTES = 16 << 10


@dataclass
class _Part:
    headers: dict[str, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class FormReader:
    """Reads a form: the bytes of part `file` into the sink, every other part into `fields`."""

    def __init__(self, boundary: bytes, sink: FileSink) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._sink = sink
        self._ready: list[bytes] = []  # of the file, parsed and not yet given to the sink
        self._part = _Part()
        self._parts = 0
        self._has_file = False
        self._ended = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        callbacks: dict[str, Any] = {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_end": self._on_end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]  # its callback types are private

    async def read(self, stream: AsyncIterator[bytes]) -> None:
        """Raises 422 `invalid_multipart`."""
        try:
            async for chunk in stream:
                self._parser.write(chunk)
                ready, self._ready = self._ready, []
                for data in ready:
                    await self._sink.write(data)
        except FormParserError as error:
            raise _invalid(f"The form cannot be read: {error}") from error
        if not self._ended:
            raise _invalid("The form ends without its closing boundary.")
        if not self._has_file:
            raise _invalid("The form has no part 'file'.")

    def _on_part_begin(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _invalid(f"The form has more than {_MAX_PARTS} parts.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._check_header()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header_name) + len(self._header_value) > _MAX_HEADER_BYTES:
            raise _invalid("A header of a part is too long.")

    def _on_header_end(self) -> None:
        if len(self._part.headers) >= _MAX_HEADERS:
            raise _invalid("A part has too many headers.")
        self._part.headers[self._header_name.decode("latin-1").lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        part = self._part
        kind, options = parse_options_header(part.headers.get("content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise _invalid("A part has no Content-Disposition: form-data with a name.")
        part.name = _text(options[b"name"])
        if part.name == "file":
            if self._has_file:
                raise _invalid("The form has two parts 'file'.")
            self._has_file = True
            if b"filename" in options:
                self.filename = _text(options[b"filename"])

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == "file":
            self._ready.append(data[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > _MAX_FIELD_BYTES:
            raise _invalid(f"The part {self._part.name[:80]!r} is too long.")

    def _on_part_end(self) -> None:
        if self._part.name != "file":
            self.fields[self._part.name] = _text(bytes(self._part.value))

    def _on_end(self) -> None:
        self._ended = True


def boundary_of(content_type: str) -> bytes:
    """The boundary of a multipart Content-Type; raises 422."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= 200:
        raise _invalid("The Content-Type has no usable boundary.")
    return boundary


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _invalid("A name or value in the form is not UTF-8.") from None


def _invalid(detail: str) -> AppError:
    return AppError("invalid_multipart", "The form is not valid", 422, detail)
