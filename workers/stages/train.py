"""train: the weights of an exported program learn to be rounded to int8 (quantization-aware training).

The teacher is the program itself, so no labels are needed: the student, which rounds where the engine will, learns to
answer as it does. Labels, where the data has class numbers, add their cross-entropy. A program exported for inference
has its batch norms' statistics fixed and its dropout gone, and is trained as it is.

A training is several calls, each of which goes on from the state that the one before it left (`TRAINING`): so a job
that is taken up again loses no more than one of them. Inputs `model` (the exported program, or that state), `training`
(a data set) and `data` (the one that judges). Samples that judge never train; those by which candidates are selected
say when it is enough. Output `model`: the state, and after the last call the trained program with the ranges that it
learned (`workers.graph.learned_ranges`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.domain.failures import FailureKind, StageFailure, model_failure
from app.domain.spec import Metric
from workers.artifacts import EXPORTED_PROGRAM, PROGRAM_FILE, TRAINING
from workers.candidates import StepPart
from workers.data import Samples
from workers.graph import learned_ranges
from workers.graph.exported_program import ProgramFolder, quiet
from workers.kernel import Stage, StageContext, StageOptions, StageResult

if TYPE_CHECKING:
    from workers.graph.qat.training import Training

STATE_FILE = "training.pt"
_BATCH = 32  # samples of a step, where the program takes any number
_HELD_OUT = 256  # samples that say when it is enough, at most
_LEAST_HELD_OUT = 4
_LEAST_TRAINING = 16
_LATER_SHARE = 0.35  # of the time left before the first call: for what comes after the training


class TrainOptions(StageOptions):
    """`round` of `rounds`. `seconds`: that the whole training may take. `op_types`: of ONNX nodes that will be rounded;
    `activations`: uint8 with a zero point, or int8 without; `reduce_range`: weights of seven bits. `part`: of the
    training data that may train; `shared`: the data that judges calibrates, too, and only its other side judges.
    `metric`: what the job judges by. `device`: where it is computed, as torch names it."""

    round: int = Field(default=1, ge=1)
    rounds: int = Field(default=1, ge=1)
    epochs: int = Field(default=20, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    seconds: float = Field(default=300.0, gt=0)
    seed: int = 0
    op_types: list[str] = Field(min_length=1)
    activations: Literal["uint8", "int8"] = "uint8"
    reduce_range: bool = False
    part: Literal["all", "calibration"] = "all"
    shared: bool = False
    metric: Metric = "auto"
    device: str = "cpu"


class Train(Stage[TrainOptions]):
    """See the module. `data`: training {steps, steps_planned, best_step, seconds, samples, held_out, overlapping,
    parameters, activations_rounded, weights_rounded, outputs {name: what is compared}, labels (the output they are of),
    fixed_norms, device (where it was computed), threads, channels_equalized, backed_off (times that the learning rate
    was made smaller), ended (why, or None), loss_before, loss, agreement_before, agreement, curve}."""

    name = "train"
    version = 3
    Options = TrainOptions
    libraries: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    takes: ClassVar[tuple[str, ...]] = (TRAINING, EXPORTED_PROGRAM)
    gives: ClassVar[Mapping[str, str]] = {"model": EXPORTED_PROGRAM}
    weight: ClassVar[float] = 4.0
    reported: ClassVar[tuple[str, ...]] = ("training",)

    @classmethod
    def kinds(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        return {"model": EXPORTED_PROGRAM if options.get("round") == options.get("rounds") else TRAINING}

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:  # noqa: ARG003
        return StepPart("quantization-aware training")

    def run(self, ctx: StageContext, options: TrainOptions) -> StageResult:
        """Raises StageFailure: `not_trainable`, `nothing_to_train`, `training_data_missing`, `training_data_too_small`,
        `training_labels_mismatch`, `training_budget_too_short`, `training_diverged`, and those of the program and of
        the data sets."""
        with quiet():
            ctx.reporter.progress(0.0, "reading the program")
            source = ProgramFolder.read(ctx.inputs["model"])
            samples, held_out = _samples(ctx, options, source)
            training = _training(source, samples, held_out, options)
            known = ctx.inputs["model"] / STATE_FILE
            if known.is_file():
                training.resume(_read(known))
            else:
                ctx.reporter.progress(0.01, "calibration")
                later = ctx.seconds_left() * _LATER_SHARE
                training.begin(min(options.seconds, ctx.seconds_left() - later))
            progress = training.progress
            first, last = progress.step, -(-progress.steps * options.round // options.rounds)
            share = max(last - first, 1) / max(progress.steps, 1)

            def tell(fraction: float, message: str) -> None:
                within = (fraction - first / max(progress.steps, 1)) / share
                ctx.reporter.progress(min(max(within, 0.0), 1.0), message)

            left = min(options.seconds - progress.seconds, ctx.seconds_left())
            training.run(last, left, tell)
            for note in _notes(source, training):
                ctx.reporter.note(note)
            _write(ctx, source, training, last=options.round == options.rounds)
        return StageResult(("model",), {"training": _told(source, training)}, reusable=not progress.cut)


def _samples(ctx: StageContext, options: TrainOptions, source: ProgramFolder) -> tuple[Samples, Samples]:
    """Those that train, and those held out; disjoint by their digests."""
    if "training" not in ctx.inputs or "data" not in ctx.inputs:
        raise StageFailure(
            "training_data_missing",
            "Training needs data to train on, and data that judges.",
            FailureKind.REQUEST,
            remedy="Name data sets under calibration.dataset_id and validation.dataset_id.",
        )
    inputs, outputs = source.interface.inputs, source.interface.outputs
    data = ctx.only_file("data")
    judges = Samples(data, inputs, outputs, part="validation" if options.shared else "all")
    held_out = Samples(data, inputs, outputs, part="select", shared=options.shared, max_samples=_HELD_OUT)
    try:
        samples = Samples(
            ctx.only_file("training"), inputs, outputs, part=options.part, exclude=frozenset(judges.digests())
        )
    except StageFailure as failure:
        if failure.code != "dataset_empty":
            raise
        raise _too_few(0, held_out) from failure
    if samples.distinct < _LEAST_TRAINING or held_out.distinct < _LEAST_HELD_OUT:
        raise _too_few(samples.distinct, held_out)
    return samples, held_out


def _too_few(training: int, held_out: Samples) -> StageFailure:
    return model_failure(
        "training_data_too_small",
        f"The data is too small to train on: {training} distinct samples that do not judge, and {held_out.distinct} "
        f"held out to say when it is enough (at least {_LEAST_TRAINING} and {_LEAST_HELD_OUT} are needed).",
        remedy="Give more samples, or a data set of its own under quantization.training.dataset_id.",
    )


def _training(source: ProgramFolder, samples: Samples, held_out: Samples, options: TrainOptions) -> Training:
    from workers.graph.qat.progress import Terms
    from workers.graph.qat.training import Training

    _, batch = source.batch_sizes(min(_BATCH, max(len(samples) // 2, 1)))
    return Training(
        source,
        samples,
        held_out,
        Terms(options.epochs, options.learning_rate, options.seed, batch, options.metric),
        op_types=options.op_types,
        activations=options.activations,
        levels=64 if options.reduce_range else 127,
        device=options.device,
    )


def _read(path: Path) -> Mapping[str, Any]:
    import torch

    state: Mapping[str, Any] = torch.load(path, weights_only=True)
    return state


def _write(ctx: StageContext, source: ProgramFolder, training: Training, *, last: bool) -> None:
    """The state; of the last call the program with its best weights, and nothing else."""
    import torch

    out = ctx.output("model")
    if not last:
        shutil.copyfile(ctx.inputs["model"] / PROGRAM_FILE, out / PROGRAM_FILE)
        source.interface.write(out)
        torch.save(training.state(), out / STATE_FILE)
        return
    tensors, ranges = training.trained()
    with torch.no_grad():
        for name, tensor in tensors.items():
            source.program.state_dict[name].copy_(tensor)
    learned_ranges.write(ranges, out)
    torch.export.save(source.program, out / PROGRAM_FILE)


def _notes(source: ProgramFolder, training: Training) -> list[str]:
    found = []
    if _fixed_norms(source):
        found.append("The batch norms were exported with fixed statistics: training works with these.")
    ended = training.progress.ended
    if ended is not None and "became" in ended:
        found.append(f"The training was stopped: {ended}.")
    return found


def _fixed_norms(source: ProgramFolder) -> int:
    """Batch norms that use the statistics they were exported with."""
    return sum("batch_norm" in str(node.target) for node in source.program.graph.nodes if node.op == "call_function")


def _told(source: ProgramFolder, training: Training) -> dict[str, Any]:
    progress = training.progress
    best = next(e for e in progress.curve if e["step"] == progress.best)
    return {
        "steps": progress.step,
        "steps_planned": progress.steps,
        "best_step": progress.best,
        "seconds": round(progress.seconds, 2),
        "samples": len(training.training),
        "held_out": len(training.held_out),
        "overlapping": 0 if training.training.part == "calibration" else training.training.excluded,
        "parameters": sum(p.numel() for p in training.weights),
        "activations_rounded": training.placed.activations,
        "weights_rounded": training.placed.weights,
        "outputs": {o.name: str(o.kind) for o in training.outputs},
        "labels": training.labelled.name if training.labelled is not None else None,
        "fixed_norms": _fixed_norms(source),
        "ended": progress.ended,
        "device": training.runner.device.type,
        "threads": progress.threads,
        "channels_equalized": progress.equalized,
        "backed_off": progress.backed_off,
        "loss_before": progress.before["loss"],
        "loss": best["loss"],
        "agreement_before": progress.before["agreement"],
        "agreement": best["agreement"],
        "curve": progress.curve,
    }
