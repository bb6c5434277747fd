"""What is told of two engines in one bundle: which batch goes to which, what each gains there, and what both cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.report import AtBatch, ByBatch, EngineShare
from app.domain.spec import OptimizationSpec
from workers.pipeline.checks import accuracy_checks
from workers.pipeline.final import mb, rounded
from workers.pipeline.outcome import Proof
from workers.pipeline.pairs import PairRun, Side
from workers.pipeline.select import Tried
from workers.search.objective import BASELINE, ratio_of


def by_batch(proof: Proof) -> ByBatch | None:
    """None where one engine ships."""
    pair = proof.picked
    if not isinstance(pair, PairRun):
        return None
    small, large = pair.sides
    sizes = {int(s) for side in pair.sides for s in side.gains} | set(proof.spec.benchmark.batch_sizes)
    return ByBatch(
        engines=[_share(proof.spec, small, 1), _share(proof.spec, large, (small.most or 0) + 1)],
        border=[*pair.border],
        batches=[_at(proof, pair, size) for size in sorted(sizes)],
        costs={**_costs(pair.tried), "alone": _alone(proof, pair)},
    )


def by_batch_told(proof: Proof) -> dict[str, Any]:
    """The same for the bundle's manifest."""
    found = by_batch(proof)
    return {} if found is None else {"by_batch": found.model_dump(mode="json")}


def _share(spec: OptimizationSpec, side: Side, least: int) -> EngineShare:
    accuracy = side.tried.accuracy or {}
    verdict, loss = "proven", 0.0 if side.run is None else accuracy.get("loss_percent")
    if side.run is not None:
        lossless, narrows = side.tried.lossless, side.tried.narrows
        checks = accuracy_checks(spec, side.tried.accuracy, lossless=lossless, narrows=narrows)
        verdict = "proven" if all(c.proven is not False for c in checks) else "unproven"
    return EngineShare(
        candidate=side.tried.id,
        name=side.name,
        backend=side.backend,
        precision=side.precision,
        least=least,
        most=side.most,
        size_mb=mb(side.engine.size_bytes) or 0.0,
        accuracy_loss_percent=rounded(loss),
        accuracy_verdict=verdict,
    )


def _at(proof: Proof, pair: PairRun, size: int) -> AtBatch:
    at = (pair.tried.figures or {}).get("batches", {}).get(str(size), {})
    ratio = ratio_of(proof.spec, at)
    alone = [_alone_at(proof.spec, side, str(size)) for side in pair.sides]
    return AtBatch(
        batch=size,
        answered_by=pair.answers(size).tried.id,
        speedup=None if ratio is None else rounded(ratio["ratio"]),
        speedup_ci=None if ratio is None else [round(float(ratio[k]), 4) for k in ("low", "high")],
        small_speedup=rounded(alone[0][0]),
        large_speedup=rounded(alone[1][0]),
        measured="full" if all(full for _, full in alone) else "short timing",
    )


def _alone_at(spec: OptimizationSpec, side: Side, size: str) -> tuple[float | None, bool]:
    """The gain of one of them at a batch size, and whether the full measurement told it."""
    if side.tried.id == BASELINE:
        return 1.0, True
    ratio = ratio_of(spec, (side.tried.figures or {}).get("batches", {}).get(size, {}))
    return (side.gains.get(size), False) if ratio is None else (float(ratio["ratio"]), True)


def _costs(tried: Tried) -> dict[str, Any]:
    figures: Mapping[str, Any] = tried.figures or {}
    return {
        "size_mb": mb(figures.get("size_bytes")),
        "memory_mb": rounded(figures.get("peak_memory_mb"), 1),
        "gpu_memory_mb": rounded(figures.get("gpu_memory_mb"), 1),
        "cold_start_ms": rounded(figures.get("cold_start_ms"), 2),
    }


def _alone(proof: Proof, pair: PairRun) -> dict[str, Any] | None:
    """Of the engine of the two that could ship by itself; the one that answers at the batch size that counts first."""
    first = pair.answers(int(proof.verdict.primary_batch))
    able = [s for s in sorted(pair.sides, key=lambda s: s is not first) if s.run is not None and not s.tried.reasons]
    return {"candidate": able[0].tried.id, **_costs(able[0].tried)} if able else None
