"""How a server of another project loads an engine. Pure; a backend answers it of its engines (`Backend.in_triton`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PYTHON = "python"  # Triton's backend that runs a script


@dataclass(frozen=True)
class Instances:
    """What is to be loaded: `count` times the engine in this folder, each with `runtime`, on this `hardware`
    (`workers.hardware.describe()`)."""

    engine: Path
    runtime: Mapping[str, Any]
    count: int
    hardware: Mapping[str, Any]


@dataclass(frozen=True)
class InTriton:
    """How Triton loads an engine.

    `backend`: of Triton's own; `PYTHON` where none loads these files as they were measured: the bundle's `infer.py`
    then runs them, and `why` says so. `files`: name in the version's folder → the engine's file. `parameters`: of the
    backend; `config`: further fields of `config.pbtxt`, `Word` for an enum's value. `profiles`: how many it has.
    `most_batch`: the largest batch that it holds, None: any. `notes`: what a reader has to know, a sentence each."""

    backend: str = PYTHON
    why: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    profiles: int = 0
    most_batch: int | None = None
    notes: tuple[str, ...] = ()
