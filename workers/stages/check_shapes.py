"""Stage `check_shapes`: an engine beside the original's answers at every shape, in several orders of calls."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from workers.kernel import Stage, StageContext, StageOptions, StageResult
from workers.measure.orders import compared
from workers.measure.pieces import folder_digest, load_session
from workers.measure.probes import read_probes


class CheckShapesOptions(StageOptions):
    """How the engine is loaded. `thorough`: in every order, else the shortest first alone."""

    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    thorough: bool = True


class CheckShapes(Stage[CheckShapesOptions]):
    """inputs: engine, probes (of `shape_probes`).

    data: shapes (see `workers.measure.orders.compared`), orders (that were tried), complete (False: the deadline left
    orders out; the shortest first is always tried), engine_digest.
    """

    name = "check_shapes"
    Options = CheckShapesOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    hardware_bound = True
    weight: ClassVar[float] = 0.5

    def run(self, ctx: StageContext, options: CheckShapesOptions) -> StageResult:
        folder = ctx.inputs["engine"]
        found, orders = compared(
            lambda: load_session(folder, options.backend, options.runtime),
            read_probes(ctx.inputs["probes"]),
            thorough=options.thorough,
            time_is_up=lambda: ctx.seconds_left() <= 0,
        )
        complete = len(orders) == (3 if options.thorough else 1) or not found
        facts = {"orders": orders, "complete": complete, "engine_digest": folder_digest(folder)}
        return StageResult(data={"shapes": found, **facts}, reusable=complete)
