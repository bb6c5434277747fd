"""The runtime cache of TensorRT for RTX: what loading a plan compiled for this GPU, kept between processes.

One file per version, GPU and driver in the installation's cache folder. It only saves seconds of a cold start: one that
is missing, damaged or of another kind is left out, and of two processes that end at the same time one keeps its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from workers import installation
from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.probe import Gpu


class Compiled:
    """The file, and the caches of the contexts that a session holds. `path` None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._held: list[Any] = []

    @classmethod
    def of(cls, library: Library, version: str, gpu: Gpu) -> Compiled:
        folder = installation.current().cache_dir
        if folder is None or not library.compiles_when_loaded:
            return cls(None)
        key = hashlib.sha256("\0".join((version, gpu.name, gpu.compute_capability, gpu.driver)).encode()).hexdigest()
        return cls(folder / f"{library.name}-runtime-{key[:32]}.compiled")

    def read(self) -> bytes:
        try:
            small = self._path is not None and self._path.stat().st_size <= installation.LARGEST_CACHE
            return self._path.read_bytes() if self._path is not None and small else b""
        except OSError:
            return b""

    def hold(self, cache: Any) -> None:
        """A runtime cache must outlive its context."""
        if cache is not None:
            self._held.append(cache)

    def keep(self) -> None:
        """Write what the first context's cache holds by now, and let go of all of them."""
        held, self._held = self._held, []
        if self._path is None or not held:
            return
        with contextlib.suppress(Exception):  # a full disk costs the next load its seconds, nothing else
            content = bytes(memoryview(held[0].serialize()))
            if len(content) <= installation.LARGEST_CACHE:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temp = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
                temp.write_bytes(content)
                temp.replace(self._path)
