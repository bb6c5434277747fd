"""Stage `reference_outputs`: what the exported original answers, kept so that it runs once for all candidates."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from workers.kernel import Stage, StageContext, StageResult
from workers.measure.pieces import Original, Pieces, SampleOptions, folder_digest, load_session, open_samples
from workers.measure.stored import OutputWriter, spec_json


class ReferenceOutputsOptions(SampleOptions):
    """As `validate` takes them, which has to be asked for the same samples. `max_bytes`: of all outputs."""

    max_bytes: int = Field(default=512 << 20, ge=0)


class ReferenceOutputs(Stage[ReferenceOutputsOptions]):
    """inputs: model (the exported original), [data], [calibration: its samples are left out of `data`]. output: outputs
    (what `validate` takes as `expected`; an index alone where nothing is stored).

    data: stored, reason (why not), samples (whose outputs are stored), batch_size, bytes, complete (False: the deadline
    stopped it; `validate` runs the original for the rest), usable (samples there are to judge by), source, part,
    left_out, samples_digest, model_digest.
    Nothing is stored where the outputs would take more than `max_bytes`, or hold text.
    """

    name = "reference_outputs"
    version = 3
    Options = ReferenceOutputsOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    hardware_bound = True

    def run(self, ctx: StageContext, options: ReferenceOutputsOptions) -> StageResult:
        session = load_session(ctx.inputs["model"], options.baseline_backend, options.baseline_runtime)
        samples = open_samples(ctx, options, session.inputs, session.outputs)
        pieces = Pieces(session.inputs, samples, options.shapes, options.seed)
        original = Original(session, pieces, ctx.reporter.note)
        writer = OutputWriter(ctx.output("outputs"), options.max_bytes)
        names: list[str] = []
        complete, done = True, 0
        for piece, outputs in original.outputs():
            names = sorted(outputs)
            if not writer.add(outputs, piece.count, pieces.total):
                break
            done += piece.count
            ctx.reporter.progress(min(done / pieces.total, 1.0), f"{done} of {pieces.total} samples")
            if done < pieces.total and ctx.seconds_left() <= 0:
                complete = False
                break
        session.close()
        facts = {
            "model_digest": folder_digest(ctx.inputs["model"]),
            "samples_digest": samples.digest() if samples is not None else None,
            "part": options.part,
            **({"shapes": options.shapes, "seed": options.seed} if samples is None else {}),
            "baseline_backend": options.baseline_backend,
            "baseline_runtime": options.baseline_runtime,
        }
        specs = {"inputs": [spec_json(s) for s in session.inputs], "outputs": [spec_json(s) for s in session.outputs]}
        writer.close(names, {**facts, **specs, "batch_size": original.batch})
        data = {
            "stored": writer.reason is None,
            "reason": writer.reason,
            "samples": sum(writer.counts),
            "batch_size": original.batch,
            "bytes": writer.bytes,
            "complete": complete,
            "usable": samples.usable if samples is not None else None,
            "source": "synthetic" if samples is None else "dataset",
            "part": options.part,
            "left_out": samples.excluded if samples is not None else 0,
            "samples_digest": facts["samples_digest"],
            "model_digest": facts["model_digest"],
        }
        return StageResult(("outputs",), data, reusable=complete)
