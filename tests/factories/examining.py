"""Stage `compatibility` in real child processes, as a worker runs it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.domain.failures import StageFailure
from workers.hardware import describe
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits, StageRequest

_LIMITS = Limits(60, 4 << 30, 1 << 30)


def examined(isolated: IsolatedRunner, model: Path, work: Path, backend: str = "tensorrt-rtx") -> dict[str, Any]:
    """The stage's data; raises StageFailure. `work` is made, and removed."""
    folders = [work / name for name in ("work", "out")]
    for folder in folders:
        folder.mkdir(parents=True)
    try:
        request = StageRequest(
            "compatibility", {"backend": backend}, {"model": str(model)}, *map(str, folders), describe(), _LIMITS
        )
        return isolated.run(request, on_progress=lambda *_: None, should_stop=lambda: False).data
    finally:
        shutil.rmtree(work)


def fuzzed(
    isolated: IsolatedRunner, graphs: Iterable[tuple[str, bytes]], folder: Path
) -> tuple[Counter[str], list[str]]:
    """How often each answer came ("accepted", the first refusal's code, a failure's), and what was no typed answer."""
    model = folder / "model"
    model.mkdir()
    found: Counter[str] = Counter()
    untyped = []
    for name, content in graphs:
        (model / "model.onnx").write_bytes(content)
        try:
            told = examined(isolated, model, folder / "call")
            answer = told["refused"][0]["code"] if told["refused"] else "accepted" if told["accepted"] else "undecided"
        except StageFailure as failure:
            answer = f"failed: {failure.code}"
            if failure.code in ("internal", "child_lost"):
                untyped.append(f"{name}: {failure.code}: {failure.detail}")
        found[answer] += 1
    return found, untyped
