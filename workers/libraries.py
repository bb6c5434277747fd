"""Versions of the libraries that are installed here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable


def installed_version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Of these distributions, under the name they are installed by (`-gpu` of some packages); what is missing is left
    out."""
    found: dict[str, str] = {}
    for name in names:
        for distribution in (name, f"{name}-gpu"):
            version = installed_version(distribution)
            if version is not None:
                found[distribution] = version
                break
    return found


def model_formats() -> list[str]:
    """The model formats that this worker can export."""
    has_torch = all(importlib.util.find_spec(name) is not None for name in ("torch", "onnxscript"))
    return ["onnx", "archive", *(["pt2"] if has_torch else [])]
