"""Stage build: a backend makes the engine for this hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from app.domain.failures import FailureKind, StageFailure
from workers.graph.onnx_files import size_of
from workers.kernel import Stage, StageContext, StageOptions, StageResult, backends
from workers.libraries import installed_versions


class BuildStageOptions(StageOptions):
    """`backend`: name of a registered backend; `options`: its own build options."""

    backend: str
    options: dict[str, Any] = Field(default_factory=dict)


class Build(Stage[BuildStageOptions]):
    """Input `model` → output `engine`, in the backend's format: for this machine, or for a target (`kernel.Target`)."""

    name: ClassVar[str] = "build"
    version: ClassVar[int] = 6
    Options = BuildStageOptions
    # The backend's own are all that has a part in it; one that is not installed adds nothing to the key.
    hardware_bound: ClassVar[bool] = True
    makes_engine: ClassVar[bool] = True
    reported: ClassVar[tuple[str, ...]] = (
        *("precision", "fused", "layer_count", "layers", "profiles", "timing_cache"),
        *("memory", "warnings", "cpu_nodes"),
    )

    @classmethod
    def accepts(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        backend = backends().get(options["backend"])
        return cls.takes if backend is None else backend.accepts

    @classmethod
    def kinds(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        backend = backends().get(options["backend"])
        return {} if backend is None else {"engine": backend.engine_format}

    def run(self, ctx: StageContext, options: BuildStageOptions) -> StageResult:
        """Raises StageFailure: `unknown_backend`, `backend_unavailable` and `invalid_backend_options` (kind REQUEST),
        or what the backend raises (`load_failed`, …). `data`: runtime, engine_format, versions, size_bytes, and what
        else the backend reports."""
        known = backends()
        if options.backend not in known:
            raise StageFailure(
                "unknown_backend",
                f"There is no backend {options.backend!r}.",
                FailureKind.REQUEST,
                remedy=f"Use one of {', '.join(sorted(known))}.",
            )
        backend = known[options.backend]()
        info, target = backend.probe(ctx.hardware), backend.built_for(options.options)
        if info is None and target not in {t.name for t in backend.targets(ctx.hardware)}:
            raise StageFailure(
                "backend_unavailable",
                f"Backend {options.backend!r} cannot run on this worker.",
                FailureKind.REQUEST,
                remedy="Choose a backend that GET /v1/capabilities lists.",
                cacheable=False,
            )
        ctx.reporter.progress(0.0, f"building with {options.backend}")
        out = ctx.output("engine")
        asked = dict(options.options)
        if backend.stops and ctx.soft_deadline is not None:  # what a deadline stops has failed, and is not kept
            asked.setdefault("max_seconds", max(ctx.seconds_left(), 1.0))
        built = backend.build(ctx.inputs["model"], out, asked, ctx.reporter, ctx.kinds.get("model", backend.accepts[0]))
        ctx.reporter.progress(1.0, "built")
        data = {
            **built,
            "engine_format": backend.engine_format,
            "versions": installed_versions(backend.libraries) if info is None or target else dict(info.versions),
            "size_bytes": size_of(out),
        }
        return StageResult(("engine",), data)
