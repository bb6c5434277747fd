"""What is told of a chain: its models, and what goes from each to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.domain.report import ChainedEngine, ChainedModel, ChainReport
from workers.kernel import backends
from workers.pipeline.final import mb
from workers.pipeline.outcome import Proof

_AS_ONE = (
    "no engines of the models apart were faster than the original with confidence within the limits: the original "
    "ships, as one model"
)


def chain_report(proof: Proof) -> ChainReport | None:
    """None where the job has one model."""
    asked, made = proof.spec.chain, proof.chain
    if asked is None or made is None:
        return None
    apart = asked.apart and proof.picked is not None
    engines = _engines(proof) if apart else [None] * len(proof.models)
    models = []
    for place, (row, told) in enumerate(zip(proof.models, made.data["models"], strict=True)):
        models.append(
            ChainedModel(
                id=row.id,
                name=row.name,
                format=row.format,
                sha256=row.sha256,
                inputs=told["inputs"],
                outputs=told["outputs"],
                taken=told["taken"],
                connect=made.data["connect"][place - 1] if place else {},
                engine=engines[place],
            )
        )
    reason = _AS_ONE if asked.apart and proof.verdict.picked is not None and not apart else None
    return ChainReport(models=models, deploy="ensemble" if apart else "merged", asked=asked.deploy, reason=reason)


def _engines(proof: Proof) -> Sequence[ChainedEngine | None]:
    """Of each model, of what ships."""
    found = []
    for member in backends()[proof.backend].members(proof.runtime):
        size = sum(file.size_bytes for file in proof.engine.files if file.name.startswith(f"{member.folder}/"))
        told = {"folder": member.folder, "backend": member.backend, "runtime": dict(member.runtime)}
        found.append(ChainedEngine(**told, size_mb=mb(size) or 0.0))
    return found


def chain_told(proof: Proof) -> dict[str, Any]:
    """The same for manifests."""
    found = chain_report(proof)
    return {} if found is None else {"chain": found.model_dump(mode="json")}
