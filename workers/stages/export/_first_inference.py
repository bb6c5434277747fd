"""The model runs for the first time: whether it does, at which batch sizes, where its batch stands, and whether it
answers the same twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from app.domain.failures import FailureKind, StageFailure
from workers.graph.onnx_graph import model_specs, set_values
from workers.kernel import Session, TensorSpec
from workers.measure.axes import axes_to_try, batch_axes, told_by_sizes, with_axes
from workers.stages.export import _graph_checks as checks
from workers.stages.export._names import write_symbols
from workers.stages.export._trial import (
    Trial,
    TrialInputs,
    batch_sizes,
    compare,
    dynamic_batch,
    first_inferences,
    open_session,
    with_node,
)
from workers.stages.export._values import seen_values, value_bounds
from workers.stages.export._write import write_model


@dataclass
class Exported:
    """What the way of a model leaves: the model as written to `folder`, and what was found out."""

    folder: Path
    model: ModelProto
    opset_before: int
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    dynamic_batch: bool = False
    notes: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)


class FirstInference:
    """Runs `exported.model`, as written to its folder, and fills in specs, `dynamic_batch`, notes and checks.

    `problem`: why strict shape inference failed, if it did. `axes`: what the user says of the batch; without, other
    axes are tried where the model does not run as its symbols read. `infer`: shape inference anew, and writing.
    """

    def __init__(
        self,
        exported: Exported,
        source: TrialInputs,
        shapes: Mapping[str, Any] | None,
        problem: Exception | None,
        axes: Mapping[str, int | None] | None,
        infer: Callable[[], Exception | None],
    ) -> None:
        self.exported, self.source, self.shapes = exported, source, shapes
        self.problem, self.axes, self.infer = problem, axes, infer

    def run(self) -> None:
        """Raises StageFailure where nothing passes."""
        exported = self.exported
        set_values(exported.model, value_bounds(exported.model))
        write_model(exported.model, exported.folder)
        exported.inputs, exported.outputs = model_specs(exported.model)
        try:
            session = open_session(exported.folder)
        except StageFailure as error:
            raise self._explained(with_node(error, exported.model)) from None
        try:
            trials = self._tried(session)
            if self.problem is not None:
                text = " ".join(str(self.problem).split())[:200]
                exported.notes.append(f"Strict shape inference failed, the model runs: {text}")
            passed = next(t for t in trials if t.failure is None)
            self._repeat(session, passed.batch)
            self._learn_values(session, passed.batch)
        finally:
            session.close()
        exported.checks["first_inference"] = [t.to_json() for t in trials]
        exported.checks["first_inference_on"] = "data" if self.source.real else "random inputs"
        self._settle_batch(trials)
        odd = sorted({name for t in trials for name in t.not_finite})
        exported.checks["finite_outputs"] = {"passed": not odd, "tensors": odd}
        if odd:
            what = "samples of the data" if self.source.real else "random inputs"
            exported.notes.append(f"NaN or Infinity in {', '.join(odd)} on {what}.")

    def _explained(self, failure: StageFailure) -> StageFailure:
        """Strict inference has seen it coming, and names the node."""
        if self.problem is None or failure.kind is not FailureKind.MODEL:
            return failure
        return checks.graph_failure(self.problem)

    # Where the batch stands

    def _tried(self, session: Session) -> list[Trial]:
        """The first way of reading the batch axes that passes at every size; else the first that passes at one."""
        partly: tuple[list[TensorSpec], list[Trial]] | None = None
        first: StageFailure | None = None
        for inputs in self._readings():
            try:
                trials = first_inferences(session, inputs, batch_sizes(inputs, self.shapes), self.source)
            except StageFailure as failure:  # the data do not fit
                first = first or failure
                continue
            if all(t.failure is None for t in trials):
                return self._accept(inputs, trials)
            if any(t.failure is None for t in trials):
                partly = partly or (inputs, trials)
            first = first or trials[0].failure
        if partly is not None:
            return self._accept(*partly)
        assert first is not None
        raise self._explained(self._with_remedy(first))

    def _readings(self) -> list[list[TensorSpec]]:
        given = list(self.exported.inputs)
        if self.axes:
            return [given]
        found = [given, *(with_axes(given, changes) for changes in axes_to_try(given))]
        stored = self.source.stored(given)
        if stored:
            told = told_by_sizes(given, stored[0])
            if told:
                found.insert(0, with_axes(given, told))
            found.append(with_axes(given, dict.fromkeys((s.name for s in given), None)))
        return found

    def _accept(self, inputs: list[TensorSpec], trials: list[Trial]) -> list[Trial]:
        """Write the reading into the model's symbols, where it is not the one that they had."""
        exported = self.exported
        before, after = batch_axes(exported.inputs), batch_axes(inputs)
        if before == after:
            return trials
        for name, axis in after.items():
            if axis != before[name]:
                where = f"the batch on axis {axis}" if axis is not None else "no batch axis"
                exported.notes.append(f"Input {name!r} has {where}: so the model runs.")
        write_symbols(exported.model, exported.inputs, inputs)
        self.infer()
        exported.inputs, exported.outputs = model_specs(exported.model)
        return trials

    def _with_remedy(self, failure: StageFailure) -> StageFailure:
        """What a user can do about a model that takes none of the inputs that were tried."""
        if failure.code != "inference_failed":
            return failure
        failure = with_node(failure, self.exported.model)
        inputs = self.exported.inputs
        if self.source.real:
            failure.remedy = (
                "Check that the model runs on the samples of the data set, and where an input's batch is not its first "
                'axis, say so: `"inputs": {NAME: {"batch_axis": AXIS}}`.'
            )
            return failure
        advice = []
        ids = [s.name for s in inputs if not s.dtype.startswith(("float", "bfloat", "bool"))]
        if ids:
            advice.append(f"name a data set in `validation`, as random values of {_named(ids)} may not suit the model")
        free = [
            f"{s.name}[{axis}]"
            for s in inputs
            for axis, dim in enumerate(s.shape)
            if isinstance(dim, str) and axis != batch_axes(inputs)[s.name]
        ]
        if free and not self.shapes:
            advice.append(f"give `shapes` for the dynamic dimensions {', '.join(free[:6])}")
        several = [s.name for s in inputs if sum(isinstance(dim, str) for dim in s.shape) > 0 and len(s.shape) > 1]
        if several and not self.axes:
            example = several[-1]
            advice.append(
                f"say where the batch stands if it is not the first axis: "
                f'`"inputs": {{"{example}": {{"batch_axis": 1}}}}` (null: no batch)'
            )
        text = "; or ".join(advice) or "check that the model runs on inputs of its declared shapes"
        failure.remedy = f"{text[0].upper()}{text[1:]}."
        return failure

    # What else a run tells

    def _repeat(self, session: Session, batch: int) -> None:
        """The same inputs twice: with dropout in training mode, or numbers that it draws, a model differs."""
        feeds = self.source.at(self.exported.inputs, batch, 0)
        try:
            first, second = session.run(feeds), session.run(feeds)
        except StageFailure:  # another attempt was the one that passed
            self.exported.checks["repeats_itself"] = {"passed": True}
            return
        found = compare(first, second)
        self.exported.checks["repeats_itself"] = {"passed": not found.significant}
        if found.significant:
            self.exported.checks["repeats_itself"] |= {"output": found.tensor, "difference": found.error}
            self.exported.notes.append(
                f"The model is random: between two runs on the same input, output {found.tensor!r} differs by "
                f"{found.error:.3g}."
            )

    def _learn_values(self, session: Session, batch: int) -> None:
        """Where random inputs do not suit the model although the data do: the values that the data hold."""
        exported = self.exported
        if not self.source.real or self._runs_on_random_inputs(session, exported.inputs, batch):
            return
        samples = self.source.samples(exported.inputs)
        seen = seen_values({s.name: [part[s.name] for part in samples] for s in exported.inputs})
        set_values(exported.model, {**value_bounds(exported.model), **seen})
        write_model(exported.model, exported.folder)
        exported.inputs, exported.outputs = model_specs(exported.model)
        if not self._runs_on_random_inputs(session, exported.inputs, batch):
            exported.notes.append("The model does not run on random inputs; only the data tell what it takes.")

    def _runs_on_random_inputs(self, session: Session, inputs: Sequence[TensorSpec], batch: int) -> bool:
        try:
            session.run(TrialInputs(None, self.shapes).at(inputs, batch, 0))
        except StageFailure:
            return False
        return True

    def _settle_batch(self, trials: Sequence[Trial]) -> None:
        exported = self.exported
        exported.dynamic_batch = dynamic_batch(exported.inputs)
        failed = next((t for t in trials if t.failure is not None), None)
        if failed is None:
            if not exported.dynamic_batch:
                self._tell_fixed()
            return
        assert failed.failure is not None
        why = f"{failed.failure.detail[:160]}{f', node {failed.failure.node}' if failed.failure.node else ''}"
        if failed.by_values:
            exported.notes.append(
                f"At batch {failed.batch} the model refused the values that were tried ({why}). That says nothing of "
                "the batch, which stays free."
            )
            return
        batch = next(t.batch for t in trials if t.failure is None)
        exported.notes.append(
            f"The model declares a dynamic batch but fails at batch {failed.batch} ({why}); it is fixed at {batch}."
        )
        _fix_batch(exported, batch)
        self.infer()
        exported.inputs, exported.outputs = model_specs(exported.model)
        exported.dynamic_batch = False

    def _tell_fixed(self) -> None:
        axes = batch_axes(self.exported.inputs)
        for spec in self.exported.inputs:
            axis = axes[spec.name]
            if axis is not None and isinstance(spec.shape[axis], int):
                self.exported.notes.append(f"The batch is fixed at {spec.shape[axis]} (input {spec.name!r}).")
                return


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (" and others" if len(names) > 4 else "")


def _fix_batch(exported: Exported, batch: int) -> None:
    """Set the batch axis of all inputs, and what has its symbol, to `batch`; for the model to be inferred anew."""
    graph, axes = exported.model.graph, batch_axes(exported.inputs)
    symbols = {s.shape[axis] for s in exported.inputs if (axis := axes[s.name]) is not None}
    for info in [*graph.input, *graph.output]:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in symbols:
                dim.dim_value = batch
    del graph.value_info[:]
