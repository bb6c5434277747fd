"""Stage `shape_probes`: what the original answers at the shapes that engines are judged at beside the data."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from app.domain.failures import StageFailure
from workers.data import Samples
from workers.kernel import Session, Stage, StageContext, StageResult
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.pieces import SampleOptions, load_session
from workers.measure.probes import ROWS, Prober, write_index, write_probes
from workers.measure.shapes import Shape, Shapes, judged_shapes, layouts


class ShapeProbesOptions(SampleOptions):
    """Which samples the probes are made of, the job's `shapes`, and how the original runs."""


class ShapeProbes(Stage[ShapeProbesOptions]):
    """inputs: model (the exported original), [data]. output: probes (inputs at each shape and the original's outputs).

    data: probes [{label, dims, sizes, batch, in_use}], left_out [{label, reason}: what the original does not take, or
    the time does not hold].
    """

    name = "shape_probes"
    Options = ShapeProbesOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    hardware_bound = True
    weight: ClassVar[float] = 0.5

    def run(self, ctx: StageContext, options: ShapeProbesOptions) -> StageResult:
        session = load_session(ctx.inputs["model"], options.baseline_backend, options.baseline_runtime)
        file = ctx.only_file("data") if "data" in ctx.inputs else None
        shapes = judged_shapes(session.inputs, None if file is None else layouts(file, session.inputs), options.shapes)
        rows = None if file is None else _rows(ctx, options, session, shapes)
        largest = min((int(r["max"][0]) for r in (options.shapes or {}).values() if r["max"]), default=ROWS)
        fixed = fixed_batch(session.inputs)
        batches = [fixed] if fixed is not None else [1, max(1, min(ROWS, largest))]
        if all(axis is None for axis in batch_axes(session.inputs).values()):
            batches = [1]
        prober = Prober(session, rows, seed=options.seed, batches=batches)
        folder = ctx.output("probes")
        probes = write_probes(folder, prober.probes(shapes))
        write_index(folder, probes, session.inputs, session.outputs)
        session.close()
        told = [{n: getattr(p, n) for n in ("label", "dims", "sizes", "batch", "in_use")} for p in probes]
        return StageResult(("probes",), {"probes": told, "left_out": prober.left_out, "why": shapes.why})


def _rows(
    ctx: StageContext, options: ShapeProbesOptions, session: Session, shapes: Shapes
) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Samples for each of the data's own shapes."""
    found = {}
    own: list[Shape] = [shapes.typical, *(way[0] for way in shapes.others if way[0].layout is not None)]
    for shape in own:
        try:
            samples = Samples(
                ctx.only_file("data"),
                session.inputs,
                session.outputs,
                part=options.part,
                shared=options.shared,
                max_samples=ROWS,
                layout=shape.layout,
            )
        except StageFailure as failure:
            if failure.code != "dataset_empty" or shape is shapes.typical:
                raise
            continue  # none in this part: they are made of others
        found[shape.label] = next(samples.batches(ROWS)).feeds
    return found
