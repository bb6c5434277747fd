"""Stage compatibility: what a backend takes of a model, told before a device for it is rented."""

from __future__ import annotations

from typing import ClassVar

from app.domain.failures import FailureKind, StageFailure
from workers.kernel import Stage, StageContext, StageOptions, StageResult, backends

_LONGEST_S = 60.0


class CompatibilityOptions(StageOptions):
    """`backend`: name of a registered backend that examines graphs on this worker."""

    backend: str


class Compatibility(Stage[CompatibilityOptions]):
    """Input `model` → no output; `data`: `workers.examined.Examined` as JSON."""

    name: ClassVar[str] = "compatibility"
    version: ClassVar[int] = 2
    Options = CompatibilityOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxruntime", "ml-dtypes")
    weight: ClassVar[float] = 0.5

    def run(self, ctx: StageContext, options: CompatibilityOptions) -> StageResult:
        """Raises StageFailure: `backend_unavailable` (kind REQUEST), and of kind INFRASTRUCTURE. What the backend
        refuses is no failure: it is the answer."""
        kind = backends().get(options.backend)
        backend = None if kind is None else kind()
        if backend is None or not backend.examines(ctx.hardware):
            raise StageFailure(
                "backend_unavailable",
                f"Backend {options.backend!r} cannot examine models on this worker.",
                FailureKind.REQUEST,
                remedy="Install its extra on a worker.",
                cacheable=False,
            )
        found = backend.examine(ctx.inputs["model"], ctx.workspace, ctx.reporter, min(ctx.seconds_left(), _LONGEST_S))
        # In what time a large model builds is a matter of the machine: worth another try, elsewhere.
        return StageResult(data={"backend": options.backend, **found.to_json()}, reusable=found.accepted is not None)
