"""What is uploaded, as bytes that can be read from any place and again: a file, or files in a .tar that is nowhere."""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from anneal_client.errors import AnnealError
from anneal_client.onnx_files import external_data

BLOCK = 1 << 20


class Source(ABC):
    """`filename` tells the service what it is, `name` what to call it; `size` in bytes."""

    filename: str
    name: str
    size: int

    @abstractmethod
    def blocks(self, start: int, length: int) -> Iterator[bytes]:
        """`length` bytes from `start`, block by block."""

    def sha256(self) -> str:
        """Hex, over all bytes."""
        digest = hashlib.sha256()
        for block in self.blocks(0, self.size):
            digest.update(block)
        return digest.hexdigest()


class FileSource(Source):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.filename, self.name = path.name, path.stem
        self.size = path.stat().st_size

    def blocks(self, start: int, length: int) -> Iterator[bytes]:
        return file_blocks(self.path, start, length)


class TarSource(Source):
    """An uncompressed .tar of files under given names. The same files give the same bytes, wherever they lie."""

    def __init__(self, name: str, files: Sequence[tuple[str, Path]]) -> None:
        self.filename, self.name = f"{name}.tar", name
        self._segments: list[tuple[int, bytes | Path]] = []
        for member, path in files:
            info = tarfile.TarInfo(member)
            info.size, info.mode = path.stat().st_size, 0o644
            header = info.tobuf(tarfile.PAX_FORMAT)
            self._segments += [(len(header), header), (info.size, path), _zeros(-info.size % tarfile.BLOCKSIZE)]
        size = sum(length for length, _ in self._segments)
        self._segments.append(_zeros(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
        self.size = size + self._segments[-1][0]

    def blocks(self, start: int, length: int) -> Iterator[bytes]:
        for size, content in self._segments:
            if start < size and length > 0:
                taken = min(size - start, length)
                if isinstance(content, Path):
                    yield from file_blocks(content, start, taken)
                elif taken:
                    yield content[start : start + taken]
                length -= taken
            start = max(0, start - size)


def model_source(path: Path) -> Source:
    """The model at `path`: an `.onnx` whose weights lie beside it is taken with them, a folder with the one in it."""
    if path.is_dir():
        path = _only_model(path)
    _require(path)
    weights = external_data(path) if path.suffix.lower() == ".onnx" else []
    if not weights:
        return FileSource(path)
    return TarSource(path.stem, [(path.name, path), *((name, path.parent / name) for name in weights)])


def data_source(path: Path) -> Source:
    """The data set at `path`: a file, or a folder of `.npz` shards."""
    if path.is_dir():
        shards = sorted(path.glob("*.npz"))
        if not shards:
            raise AnnealError(
                "no_shards", f"There is no .npz in the folder {path}.", remedy="Name the data set's file."
            )
        return TarSource(path.resolve().name, [(shard.name, shard) for shard in shards])
    _require(path)
    return FileSource(path)


def file_blocks(path: Path, start: int, length: int) -> Iterator[bytes]:
    """`length` bytes of the file from `start`, block by block."""
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(BLOCK, length))):
            length -= len(block)
            yield block


def _only_model(folder: Path) -> Path:
    found = sorted(p for pattern in ("*.onnx", "*.pt2") for p in folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found)
    detail = f"{folder} holds {names}." if found else f"{folder} holds no .onnx and no .pt2."
    raise AnnealError("ambiguous_model" if found else "no_model", detail, remedy="Name the model's file.")


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _zeros(length: int) -> tuple[int, bytes]:
    return length, bytes(length)
