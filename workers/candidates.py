"""Candidates as data: what the planner and the backends speak of. Nothing here runs anything.

A candidate is graph steps (keyed stage calls), how a backend builds the result, and how the engine is loaded. So it can
be cached, resumed, compared and moved to another machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from app.domain.spec import OptimizationSpec
from workers.artifacts import ONNX

# Instructions with which int8 gains: dot products of bytes (x86 VNNI and AMX, Arm dot product).
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_EACH = "each"  # runtime option of engines in a chain: those of all of them
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Rounding:
    """Of a step that quantizes, so that its accuracy may be won back: by other `calibrations` (values of its option
    `method`, those worth a try after another) or by nodes that it leaves out (`exclude_nodes`). `in_onnx`: it writes
    the rounding into an ONNX graph, so that what comes before may be equalized, and its effect be simulated."""

    calibrations: tuple[str, ...] = ()
    in_onnx: bool = False


@dataclass(frozen=True)
class Step:
    """One stage call of a candidate; `extra` names further inputs beside the graph that flows from step to step.
    `rounding`: what the stage says of it (`kernel.Stage.rounding`), once it is planned. `group`: what it is one of
    several steps of, that go together: they are made once for all candidates, and left out as one."""

    stage: str
    options: Mapping[str, Any]
    extra: tuple[str, ...] = ()
    rounding: Rounding | None = None
    group: str | None = None

    def describe(self) -> str:
        """For the report: the stage and the options that tell recipes apart."""
        told = [str(self.options[k]) for k in ("recipe", "method") if self.options.get(k)]
        if self.options.get("fusions"):
            told.append("fusions")
        return f"{self.stage}({', '.join(told)})" if told else self.stage


@dataclass(frozen=True)
class StepPart:
    """What a step is called where its gain is told. `instead`: its options in the engine without that part; None: the
    step is left out."""

    name: str
    instead: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Candidate:
    """A configuration to try.

    `runtime` is laid over the runtime options that the build returns: several candidates can share one engine file.
    `prior` is the expected latency over the baseline's, from measurements elsewhere (1.0 = nothing known); it decides
    the order of trying, never the verdict. `lossless`: the same arithmetic, differs from the original by rounding only.
    `narrows`: which of this model's types the library computes in narrower ones; what does is not lossless.
    `other_values`: its runtime options change the arithmetic, so that its accuracy is not that of the engine as built.
    `unlikely`: why it seldom wins on such a machine; only an exhaustive search tries it. `rest`: what the nodes compute
    in that it does not quantize. `options_gain`: what its other runtime options may gain at most, where that is more
    than options usually do: it is tried with them although without them it is not among the fastest.
    """

    id: str
    name: str
    backend: str
    precision: str
    steps: tuple[Step, ...]
    build_options: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    lossless: bool = False
    prior: float = 1.0
    unlikely: str | None = None
    other_values: bool = False
    narrows: str | None = None
    rest: str = "fp32"
    options_gain: float | None = None

    def __post_init__(self) -> None:
        assert not (self.lossless and self.narrows), "what computes in narrower types is not lossless"

    @property
    def recipe(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in sorted(self.runtime.get(_EACH, self.runtime).items()))
        steps = [told for told, _ in groupby(step.group or step.describe() for step in self.steps)]
        return " → ".join([*steps, "build"]) + (f" [{options}]" if options else "")

    def after(self, steps: Sequence[Step], suffix: str, name: str, instead: Mapping[str, Step]) -> Candidate:
        """The same, of a graph that comes out of these steps. `instead`: by stage, what takes the place of its own."""
        own = (instead.get(step.stage, step) for step in self.steps)
        return replace(self, id=f"{self.id}.{suffix}", name=f"{self.name}, {name}", steps=(*steps, *own))

    def linked(self, backend: str) -> Candidate:
        """The same with an engine of each model of a chain, which `backend` calls one after the other."""
        return replace(
            self,
            backend=backend,
            build_options={"backend": self.backend, "options": dict(self.build_options)},
            runtime={_EACH: dict(self.runtime)} if self.runtime else {},
        )

    def unlinked(self) -> Candidate:
        """What `linked` was called on."""
        built = self.build_options
        return replace(
            self, backend=built["backend"], build_options=built["options"], runtime=self.runtime.get(_EACH, {})
        )

    def variant(
        self, suffix: str, name: str, unlikely: str | None = None, *, other_values: bool = False, **runtime: Any
    ) -> Candidate:
        """The same engine, loaded with other runtime options."""
        return replace(
            self,
            id=f"{self.id}.{suffix}",
            name=f"{self.name}, {name}",
            runtime={**self.runtime, **runtime},
            unlikely=unlikely,
            other_values=other_values,
            lossless=self.lossless and not other_values,
            options_gain=None,
        )


@dataclass(frozen=True)
class Target:
    """A kind of device that need not be here to build for it. `precisions`: that it gains by. `hardware`: what of
    `workers.hardware.describe()` tells of it, on a machine that has one."""

    name: str
    precisions: tuple[str, ...]
    hardware: Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """One of several engines that lie side by side: below `folder`, and loaded by `backend` with `runtime`. It answers
    batches of at most `most` samples that none before it does; None: all others. `link`: it answers none alone: every
    call goes through all of them."""

    folder: str
    backend: str
    runtime: Mapping[str, Any]
    most: int | None
    link: bool = False


@dataclass(frozen=True)
class Skipped:
    """Something the user asked for, or would expect, that is not tried; and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Proposal:
    """What a backend would try for a case, and what it would not."""

    candidates: tuple[Candidate, ...] = ()
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Narrowing:
    """What a library computes in narrower types than the model's. `float64`, `integers`: in which instead, None where
    it keeps them. `seen_in`: the version in which that was seen, or whose documentation says so."""

    float64: str | None
    integers: str | None
    seen_in: str

    def of(self, case: Case) -> str | None:
        """What of this case's model it would narrow; None where it is nothing."""
        told = []
        doubles, wide = case.arithmetic.get("float64") or (), case.arithmetic.get("integers") or ()
        if self.float64 and doubles:
            told.append(f"float64 (tensor {doubles[0]!r}) in {self.float64}")
        if self.integers and wide:
            where = f"node {wide[0]['node']!r}" if wide[0]["node"] else f"output {wide[0]['tensor']!r}"
            told.append(f"integers that may be large ({where}) in {self.integers}")
        return f"it computes {' and '.join(told)}" if told else None


@dataclass(frozen=True)
class Case:
    """What is known of the job before anything is tried. `ops`: op type → count in the exported graph. `kind`: as in
    `workers.graph.onnx_graph` (cnn, transformer, rnn, …). `arithmetic`: as in `workers.graph.onnx_arithmetic`.
    `size_bytes`: of the exported model. `same_data`: one data set for calibration and validation, which is split.
    `random`: the original does not answer the same twice. `kinds`: of the artifacts that the export gave
    (`workers.artifacts`). `device`: where the engines run."""

    spec: OptimizationSpec
    ops: Mapping[str, int]
    kind: str
    quantized: bool = False
    size_bytes: int = 0
    isa: Sequence[str] = ()
    cores: int = 1
    hardware: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: Mapping[str, Any] = field(default_factory=dict)
    has_calibration: bool = False
    same_data: bool = False
    random: bool = False
    kinds: Sequence[str] = (ONNX,)
    device: str = "cpu"

    @property
    def int8_pays(self) -> bool:
        return bool(INT8_FLAGS & set(self.isa))

    @property
    def bf16_pays(self) -> bool:
        return bool(BF16_FLAGS & set(self.isa))

    def wants(self, precision: str) -> bool:
        """Whether the job lets the search use this precision."""
        return self.spec.precisions is None or precision in self.spec.precisions

    def has(self, *ops: str) -> list[str]:
        """Those of `ops` that the graph holds, in the order given."""
        return [op for op in ops if self.ops.get(op)]
