"""What backends whose engine holds engines of other backends share: loading them, and how their bundles' scripts do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers import kernel
from workers.kernel import Session

# Part of an `infer.py` whose engines lie in folders beside it, with an `infer.py` each.
ENGINE_OF = '''
def engine_of(folder):
    """The `infer.py` of one engine, as a module."""
    spec = importlib.util.spec_from_file_location(f"infer_{folder}", HERE / folder / "infer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
'''


def load_each(engines: Iterable[tuple[str, Path, Mapping[str, Any]]]) -> list[Session]:
    """A session of each (backend, folder, runtime), or of none. Raises StageFailure as their own backends do, and
    `backend_unavailable` where one is missing."""
    known = kernel.backends()
    loaded: list[Session] = []
    try:
        for backend, folder, runtime in engines:
            if backend not in known:
                detail = f"This worker has no backend {backend!r}."
                raise StageFailure("backend_unavailable", detail, FailureKind.REQUEST)
            loaded.append(known[backend]().load(folder, runtime))
    except StageFailure:
        for session in loaded:
            session.close()
        raise
    return loaded
