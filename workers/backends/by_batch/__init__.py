"""Several engines in one bundle, each for the batch sizes at which it is the fastest: what a call goes to is chosen by
how many samples it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.domain.failures import FailureKind, StageFailure
from workers import kernel
from workers.artifacts import BY_BATCH, ONNX
from workers.backends.bundle_script import HURRY
from workers.backends.by_batch.script import infer_script
from workers.backends.by_batch.session import ByBatchSession
from workers.backends.options import parsed
from workers.backends.several import load_each
from workers.candidates import Candidate, Case, Member, Proposal
from workers.kernel import Backend, BackendInfo, Reporter, Session
from workers.serving.native import Instances, InTriton


class _Engine(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")]
    backend: str
    runtime: dict[str, Any]
    most: Annotated[int, Field(ge=1)] | None


class RuntimeOptions(BaseModel):
    """`input`, `axis`: where the batch size is read off. `engines`: by growing batch size, the last one without a
    limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    axis: int = Field(ge=0)
    engines: list[_Engine] = Field(min_length=1)


class ByBatchBackend(Backend):
    """Engine = engines of other backends, in a folder each. It builds none and proposes none: the pipeline puts two
    that were built, judged and timed side by side."""

    name: ClassVar[str] = "by-batch"
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    accepts: ClassVar[tuple[str, ...]] = ()
    engine_format: ClassVar[str] = BY_BATCH
    script_hurry: ClassVar[tuple[str, ...]] = HURRY

    @classmethod
    def members(cls, runtime: Mapping[str, Any]) -> tuple[Member, ...]:
        return tuple(Member(e.folder, e.backend, e.runtime, e.most) for e in _options(runtime).engines)

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:  # noqa: ARG002
        """Nothing that a job could ask for."""
        return None

    def propose(self, case: Case) -> Proposal:  # noqa: ARG002
        return Proposal()

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:  # noqa: ARG002
        return ()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        known = kernel.backends()
        engines = [
            {**e, "runtime": known[e["backend"]]().with_threads(e["runtime"], threads)} for e in runtime["engines"]
        ]
        return {**runtime, "engines": engines}

    def build(
        self,
        model: Path,  # noqa: ARG002
        out: Path,  # noqa: ARG002
        options: Mapping[str, Any],  # noqa: ARG002
        reporter: Reporter,  # noqa: ARG002
        kind: str = ONNX,  # noqa: ARG002
    ) -> dict[str, Any]:
        detail = "Engines that are chosen by the batch size are built one by one, by their own backends."
        raise StageFailure("nothing_to_build", detail, FailureKind.REQUEST, remedy="Name the backend of one engine.")

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Raises StageFailure as the engines' own backends do, and `backend_unavailable` where one is missing."""
        options = _options(runtime)
        loaded = load_each((e.backend, engine / e.folder, e.runtime) for e in options.engines)
        return ByBatchSession(loaded, [e.most for e in options.engines], options.input, options.axis)

    def in_triton(self, instances: Instances) -> InTriton:  # noqa: ARG002
        return InTriton(why="it holds two engines, and each call goes to the one for its batch size")

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return infer_script(_options(runtime).model_dump(mode="json"))


class ByBatchCudaBackend(ByBatchBackend):
    """The same of engines that run on an NVIDIA GPU."""

    name: ClassVar[str] = "by-batch-cuda"
    device: ClassVar[str] = "cuda"


def _options(runtime: Mapping[str, Any]) -> RuntimeOptions:
    found = parsed(RuntimeOptions, runtime, "the choice by batch size")
    assert isinstance(found, RuntimeOptions)
    return found
