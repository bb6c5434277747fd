"""What of a stage call's surroundings is part of its key (`app.domain.artifact_key`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.artifact_key import digest_of
from workers import kernel
from workers.libraries import installed_versions
from workers.members import names_of

StageType = type[kernel.Stage[Any]]


def backends(options: Mapping[str, Any]) -> list[type[kernel.Backend]]:
    """Every backend that a stage call's options name."""
    engines = options.get("engines") or ()
    pairs = [(e.get("backend"), e.get("runtime") or {}) for e in (options, *engines)]
    named = {name for backend, runtime in pairs if backend is not None for name in names_of(backend, runtime)}
    known = kernel.backends()
    return [known[n] for n in sorted({*named, str(options.get("baseline_backend"))}) if n in known]


def libraries(stage: StageType, options: Mapping[str, Any]) -> dict[str, str]:
    """The distributions whose versions have a part in the result; of a plug-in also its own."""
    of_backends = [name for b in backends(options) for name in (*b.libraries, b.distribution)]
    return installed_versions(name for name in (*stage.libraries, stage.distribution, *of_backends) if name)


def in_key(stage: StageType, found: Mapping[str, str]) -> dict[str, str]:
    """`libraries` as the key has them. What is not bound to a machine runs on no GPU, and a package for GPUs
    (`onnxruntime-gpu`) gives there, byte for byte, the graphs of the plain one: a worker that builds ahead has that."""
    if stage.hardware_bound:
        return dict(found)
    return {name.removesuffix("-gpu"): version for name, version in found.items()}


def target(stage: StageType, options: Mapping[str, Any]) -> str | None:
    """What the engine of this call is built for, where any machine builds the same; None for all other calls."""
    used = backends(options) if stage.makes_engine else []
    return next((t for b in used if (t := b.built_for(options.get("options") or {})) is not None), None)


def hardware(
    stage: StageType, options: Mapping[str, Any], described: Mapping[str, Any], fingerprint: str, key_id: str
) -> str:
    """The machine, or the target alone where that decides; with the signing key's id where engines are signed: those of
    another are built anew."""
    used, built_for = backends(options), target(stage, options)
    facts = {b.name: dict(b.facts_of_build(described)) for b in used}
    told = {name: found for name, found in facts.items() if found}
    parts = [fingerprint if built_for is None else f"target:{built_for}", *([digest_of(told)] if told else [])]
    return "/".join([*parts, *([key_id] if any(b.signed for b in used) else [])])
