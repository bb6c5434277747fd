"""A TensorRT plan in Triton: its `tensorrt` backend. Held against nothing that runs here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.options import RuntimeOptions
from workers.backends.tensorrt.sidecar import PLAN_FILE, SIDECAR_FILE
from workers.serving.native import InTriton

_NAME_THERE = "model.plan"


def in_triton(library: Library, engine: Path, options: RuntimeOptions) -> InTriton:
    if library.compiles_when_loaded:
        return InTriton(why=f"Triton has no backend for plans of {library.title}")
    if options.declared:
        names = ", ".join(sorted(options.declared))
        return InTriton(why=f"types differ between the model and the plan ({names}), which infer.py converts")
    facts = json.loads((engine / SIDECAR_FILE).read_text(encoding="utf-8"))
    profiles: Sequence[Mapping[str, Any]] = facts["profiles"]
    config: dict[str, Any] = {"optimization": {"cuda": {"graphs": True}}} if options.cuda_graph else {}
    return InTriton(
        backend="tensorrt",
        files={_NAME_THERE: PLAN_FILE},
        config=config,
        profiles=len(profiles),
        most_batch=_most_batch(profiles),
        notes=(
            f"The plan loads with TensorRT {facts['tensorrt']}, which the server's image must have, on "
            f"{facts['gpu']['name']}.",
        ),
    )


def _most_batch(profiles: Sequence[Mapping[str, Any]]) -> int | None:
    """The largest batch that a profile holds for all its inputs; None without profiles."""
    return max((min(shapes["max"][0] for shapes in p.values()) for p in profiles if p), default=None)
