"""observe: an exported program, and how large the inputs of its matrix products get on the user's data.

Inputs `model` (an exported program) and `calibration` (a data set). Output `model`: the same program with
`ranges.json`, by which a backend computes those products in float8 with static scales. The samples are streamed through
torch on the CPU; the same inputs give the same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.domain.failures import FailureKind, StageFailure, data_failure, model_failure
from workers.artifacts import EXPORTED_PROGRAM, PROGRAM_FILE
from workers.candidates import StepPart
from workers.data import Samples
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder, message_of
from workers.kernel import Stage, StageContext, StageOptions, StageResult

if TYPE_CHECKING:
    from workers.kernel import Arrays

_BATCH = 8  # at most, where the program takes any


class ObserveOptions(StageOptions):
    """`max_samples` and `part` say what to calibrate on."""

    max_samples: int = Field(default=64, ge=1)
    part: Literal["all", "calibration"] = "all"


class Observe(Stage[ObserveOptions]):
    """See the module. `data`: products (how many were seen), calibration {samples, dataset}."""

    name = "observe"
    version = 1
    Options = ObserveOptions
    libraries: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    takes: ClassVar[tuple[str, ...]] = (EXPORTED_PROGRAM,)
    gives: ClassVar[Mapping[str, str]] = {"model": EXPORTED_PROGRAM}
    weight: ClassVar[float] = 2.0
    rounds: ClassVar[bool] = True
    reported: ClassVar[tuple[str, ...]] = ("products", "calibration")

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:  # noqa: ARG003
        return StepPart("matrix products in float8")

    def run(self, ctx: StageContext, options: ObserveOptions) -> StageResult:
        """Raises StageFailure: `calibration_data_missing`, `nothing_to_quantize`, `calibration_failed`,
        `values_not_finite`, and those of the program and of the data set."""
        if "calibration" not in ctx.inputs:
            raise StageFailure(
                "calibration_data_missing",
                "Static fp8 needs calibration data.",
                FailureKind.REQUEST,
                remedy="Name a data set under calibration.dataset_id.",
            )
        source = ProgramFolder.read(ctx.inputs["model"])
        inputs = source.interface.inputs
        path = ctx.only_file("calibration")
        samples = Samples(path, inputs, source.interface.outputs, part=options.part, max_samples=options.max_samples)
        read = 0

        def batches() -> Iterator[Arrays]:
            nonlocal read
            least, most = source.batch_sizes(_BATCH)
            for part in samples.batches(most):
                if read and ctx.seconds_left() <= 0:
                    return
                yield part.filled(max(len(part), least))
                read += len(part)
                ctx.reporter.progress(0.1 + 0.8 * read / len(samples), f"{read} samples")

        found = _observed(source, batches())
        out = ctx.output("model")
        shutil.copy(ctx.inputs["model"] / PROGRAM_FILE, out / PROGRAM_FILE)
        source.interface.write(out)
        program_ranges.write(out, found)
        data = {"products": len(found), "calibration": {"samples": read, "dataset": samples.digest()}}
        return StageResult(outputs=("model",), data=data, reusable=read == len(samples))


def _observed(source: ProgramFolder, batches: Iterator[Arrays]) -> dict[str, float]:
    try:
        found = program_ranges.observed(source, batches)
    except (StageFailure, MemoryError):
        raise
    except Exception as error:  # whatever an operator says of the data
        raise data_failure(
            "calibration_failed",
            f"The program does not run on the calibration data: {message_of(error, deepest=True)}",
            remedy="Check that the model runs on this data.",
        ) from error
    if not found:
        raise model_failure(
            "nothing_to_quantize",
            "There is nothing to quantize: the program has no matrix product with weights.",
            remedy="Use another precision for this model.",
        )
    odd = next((name for name, most in found.items() if not math.isfinite(most)), None)
    if odd is not None:
        raise data_failure(
            "values_not_finite",
            f"The input of {odd!r} is not finite on the calibration data.",
            node=odd,
            remedy="Look for values in the data that the model cannot take.",
        )
    return found
