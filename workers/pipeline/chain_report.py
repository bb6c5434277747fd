"""What is told of a chain: its models, and what goes from each to the next one."""

from __future__ import annotations

from typing import Any

from app.domain.report import ChainedModel, ChainReport
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
            )
        )
    apart = asked.apart and proof.picked is not None
    reason = _AS_ONE if asked.apart and proof.verdict.picked is not None and not apart else None
    return ChainReport(models=models, deploy="ensemble" if apart else "merged", asked=asked.deploy, reason=reason)


def chain_told(proof: Proof) -> dict[str, Any]:
    """The same for manifests."""
    found = chain_report(proof)
    return {} if found is None else {"chain": found.model_dump(mode="json")}
