"""Report and manifest as stored blobs, the row of the engine that ships, and the failure of a job whose constraints
nobody meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import Engine
from app.domain.failures import FailureKind, StageFailure
from app.domain.report import Report
from app.jobs.ledger import Claim
from workers.pipeline.checks import Check
from workers.pipeline.outcome import Optimization
from workers.pipeline.workspace import Workspace

# The fields of the job's spec that the checks come from.
_FIELDS = {
    "accuracy_loss_percent": "validation.max_accuracy_loss_percent",
    "p99_latency_ms": "constraints.p99_latency_ms",
    "throughput_qps": "constraints.min_throughput_qps",
    "memory_mb": "constraints.max_memory_mb",
    "size_mb": "constraints.max_size_mb",
}


@dataclass(frozen=True)
class Published:
    """Digest and size of the two documents in storage."""

    body: Report
    report: tuple[str, int]
    manifest: tuple[str, int]

    def columns(self) -> dict[str, Any]:
        """For a job that fails with a report of what was tried."""
        return {
            "report_sha256": self.report[0],
            "report_sha256_size": self.report[1],
            "manifest_sha256": self.manifest[0],
            "manifest_sha256_size": self.manifest[1],
        }


def publish(workspace: Workspace, report: Report, manifest_for: Callable[[str], dict[str, Any]]) -> Published:
    stored = workspace.store_document("report", report.model_dump(mode="json"))
    return Published(report, stored, workspace.store_document("manifest", manifest_for(stored[0])))


def no_feasible_candidate(found: Optimization) -> StageFailure:
    """Says which configuration came nearest and what would have to give."""
    assert found.verdict.nearest is not None
    name, missed = found.verdict.nearest
    misses = "; ".join(c.reason or f"{c.name} {c.value}, limit {c.limit}" for c in missed)
    relax = ", ".join(
        f"{_FIELDS.get(c.name, c.name)} to {'more than ' if c.at_least else ''}{c.judged:.4g}"
        for c in missed
        if _is_measured_miss(c)
    )
    return StageFailure(
        "no_feasible_candidate",
        f"No configuration meets all constraints. The nearest is {name}: {misses}.",
        FailureKind.REQUEST,
        "benchmark",
        remedy=f"Relax {relax}." if relax else "Relax the constraints that the report names.",
    )


def _is_measured_miss(check: Check) -> bool:
    """Whether another limit would help: not where a figure is missing, or good and only not proven."""
    if check.judged is None or check.limit is None:
        return False
    return check.judged < check.limit if check.name == "throughput_qps" else check.judged > check.limit


def engine_row(claim: Claim, found: Optimization, published: Published, hardware: dict[str, Any]) -> Engine:
    """What is delivered. `hardware`: that it was measured on."""
    assert found.package is not None
    (engine_file,) = found.package.outputs["engine"].files
    (bundle_file,) = found.package.outputs["bundle"].files
    options = found.package.options
    final = published.body.final_metrics
    return Engine(
        id=new_id("eng"),
        tenant_id=claim.tenant_id,
        job_id=claim.job_id,
        model_id=found.model.id,
        backend=options["backend"],
        format=options["engine_format"],
        precision=options["manifest"]["engine"]["precision"],
        filename=engine_file.name,
        sha256=engine_file.sha256,
        size_bytes=engine_file.size_bytes,
        bundle_filename=bundle_file.name,
        bundle_sha256=bundle_file.sha256,
        bundle_size_bytes=bundle_file.size_bytes,
        hardware=hardware,
        runtime=options["runtime"],
        metrics=final.model_dump(mode="json") if final else {},
        created_at=utcnow(),
    )
