"""Several engines as one, each of a model of a chain: what one gives goes to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.domain.failures import FailureKind, StageFailure
from workers import kernel
from workers.artifacts import CHAINED, ONNX
from workers.backends.bundle_script import HURRY
from workers.backends.chained.script import infer_script
from workers.backends.chained.session import ChainedSession
from workers.backends.options import parsed
from workers.backends.several import load_each
from workers.candidates import Candidate, Case, Member, Proposal
from workers.kernel import Backend, BackendInfo, Reporter, Session, TensorSpec
from workers.serving.native import Instances, InTriton


class _Engine(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")]
    backend: str
    runtime: dict[str, Any]


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: str
    shape: list[int | str]
    values: tuple[int, int | str] | None = None


class RuntimeOptions(BaseModel):
    """`engines`: in order; each takes tensors by their names, of the whole or of what those before it give. `each`:
    options that lie over those of every engine. `inputs`, `outputs`: of the whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: list[_Engine] = Field(min_length=2)
    inputs: list[_Input]
    outputs: list[str]
    each: dict[str, Any] = {}

    def runtime_of(self, engine: _Engine) -> dict[str, Any]:
        return {**engine.runtime, **self.each}


class ChainedBackend(Backend):
    """Engine = engines of another backend, in a folder each. It proposes nothing by itself: of a job that wants an
    engine of each model, the planner makes its candidates of the others' (`Candidate.linked`), and the pipeline cuts
    the graph and has that backend build each part."""

    name: ClassVar[str] = "chained"
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    accepts: ClassVar[tuple[str, ...]] = (ONNX,)
    engine_format: ClassVar[str] = CHAINED
    script_hurry: ClassVar[tuple[str, ...]] = HURRY

    @classmethod
    def members(cls, runtime: Mapping[str, Any]) -> tuple[Member, ...]:
        options = _options(runtime)
        return tuple(Member(e.folder, e.backend, options.runtime_of(e), None, link=True) for e in options.engines)

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:  # noqa: ARG002
        """Nothing that a job could ask for."""
        return None

    def propose(self, case: Case) -> Proposal:  # noqa: ARG002
        return Proposal()

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        """Those of the engines' own backend, for all of them."""
        one = candidate.unlinked()
        return [v.linked(self.name) for v in kernel.backends()[one.backend]().variants(case, one)]

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        options, known = _options(runtime), kernel.backends()
        engines = [
            {
                "folder": e.folder,
                "backend": e.backend,
                "runtime": known[e.backend]().with_threads(options.runtime_of(e), threads),
            }
            for e in options.engines
        ]
        return {**runtime, "engines": engines, "each": {}}

    def build(
        self,
        model: Path,  # noqa: ARG002
        out: Path,  # noqa: ARG002
        options: Mapping[str, Any],  # noqa: ARG002
        reporter: Reporter,  # noqa: ARG002
        kind: str = ONNX,  # noqa: ARG002
    ) -> dict[str, Any]:
        detail = "Engines of a chain are built one by one, by their own backends."
        raise StageFailure("nothing_to_build", detail, FailureKind.REQUEST, remedy="Name the backend of one engine.")

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Raises StageFailure as the engines' own backends do, and `backend_unavailable` where one is missing."""
        options = _options(runtime)
        loaded = load_each((e.backend, engine / e.folder, options.runtime_of(e)) for e in options.engines)
        inputs = [TensorSpec(i.name, i.dtype, tuple(i.shape), i.values) for i in options.inputs]
        return ChainedSession(loaded, inputs, options.outputs)

    def in_triton(self, instances: Instances) -> InTriton:  # noqa: ARG002
        return InTriton(why="it holds an engine of each model")

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        options = _options(runtime)
        return infer_script([e.folder for e in options.engines], [i.name for i in options.inputs], options.outputs)


class ChainedCudaBackend(ChainedBackend):
    """The same of engines that run on an NVIDIA GPU."""

    name: ClassVar[str] = "chained-cuda"
    device: ClassVar[str] = "cuda"


def _options(runtime: Mapping[str, Any]) -> RuntimeOptions:
    found = parsed(RuntimeOptions, runtime, "the chain of engines")
    assert isinstance(found, RuntimeOptions)
    return found
