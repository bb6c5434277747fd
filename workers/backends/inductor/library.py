"""Torch, as the engines here use it: its import, its caches in the stage's own folder, what code is compiled for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.graph.exported_program import message_of, quiet
from workers.hardware import instruction_sets
from workers.libraries import installed_version

_MEMORY = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory", "killed signal")
LOWERING = 3  # goes up when the same program is compiled otherwise: engines of before are built anew
_NO_SPACE = "No space left on device"
_PRINTED = "Output:\n"
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def torch_version() -> str | None:
    """Without importing it: a process that forks must not hold its threads."""
    return installed_version("torch")


def library(*, compiles: bool = False) -> Any:
    """Torch; `compiles`: with Inductor's modules, whose import takes several times as long and which a package does not
    need, and without its compile workers, which would live in process groups of their own. Raises
    StageFailure(`backend_unavailable`)."""
    try:
        with quiet():
            import torch

            if compiles:
                import torch._inductor.config
                import torch.export

                torch._inductor.config.compile_threads = 1  # the environment is read once, at the import
    except Exception as error:  # a broken installation shows as any kind of error
        raise StageFailure(
            "backend_unavailable",
            f"Torch cannot be imported: {message_of(error)}",
            FailureKind.REQUEST,
            remedy="Ask the operator to install the extra `torch` (pip install 'anneal[torch]').",
            cacheable=False,
        ) from None
    return torch


@contextmanager
def contained() -> Iterator[Path]:
    """A folder for all caches of Inductor and Triton, below the stage's workspace and gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="inductor-", dir=os.environ.get("TMPDIR")))
    ours = dict.fromkeys(_CACHES, str(folder))
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def open_package(path: Path) -> Any:
    """AOTInductor's own loader, which `torch._inductor.aoti_load_package` wraps: without the imports of that, and
    without its lock, for one thread at a time (a CUDA graph is captured without a lock). Unpacks below $TMPDIR, up to
    torch 2.12 below /tmp."""
    torch = library()
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)


def target(device: str) -> dict[str, Any]:
    """What compiled code depends on here: torch's version, and the GPU or the processor's instructions, all of which
    it may use."""
    torch = library()
    told: dict[str, Any] = {"torch": str(torch.__version__)}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        gpu = {"GPU": torch.cuda.get_device_name(), "compute capability": f"{major}.{minor}"}
        return {**told, **gpu, "CUDA": str(torch.version.cuda)}
    return {**told, "instructions": instruction_sets()}


def failure(code: str, error: BaseException, **where: Any) -> StageFailure:
    """Of what torch raised; `out_of_memory` or `storage_full` where that is what it says."""
    while error.__cause__ is not None:
        error = error.__cause__
    whole = str(error)
    # Of a C++ compiler that failed: what it printed, without the pages of its command line.
    text = message_of(RuntimeError(whole.rpartition(_PRINTED)[2] or type(error).__name__))
    if isinstance(error, MemoryError) or any(words in whole.lower() for words in _MEMORY):
        code = "gpu_out_of_memory" if "cuda" in whole.lower() else "out_of_memory"
        return StageFailure(code, f"Torch needs more memory: {text}", FailureKind.MODEL, cacheable=False)
    if _NO_SPACE in whole:
        return StageFailure("storage_full", f"Torch: {text}", FailureKind.INFRASTRUCTURE, cacheable=False)
    return StageFailure(code, f"Torch: {text}", FailureKind.MODEL, **where)


def facts_of(hardware: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the compiled code beside libraries and processor."""
    return {"cxx": hardware.get("cxx"), "lowering": LOWERING}
