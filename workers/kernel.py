"""The contracts that stages and backends are written against.

A stage is typed options plus one function from files to files. It runs in a child process
(`workers.pipeline.isolated`), sees folders, options and a `Reporter`, and never the database, the queue or HTTP.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from app.domain.failures import FailureKind, StageFailure
from workers import registry
from workers.artifacts import ONNX
from workers.candidates import Candidate, Case, Member, Proposal, Rounding, Skipped, StepPart, Target
from workers.examined import Examined, Refused
from workers.serving.native import Instances, InTriton

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray[Any, Any]]


class StageOptions(BaseModel):
    """Base of every stage's options. They are part of the stage's key: only what changes the output belongs here."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OptionsT = TypeVar("OptionsT", bound=StageOptions)


class Reporter(ABC):
    """Where a stage tells how far it is. Cheap to call often; the receiver throttles."""

    @abstractmethod
    def progress(self, fraction: float, message: str = "") -> None:
        """`fraction` of this stage's work that is done, 0…1."""

    @abstractmethod
    def note(self, message: str, **facts: Any) -> None:
        """Something a person reading the report should know, e.g. that a simplifier was given up and why."""


@dataclass(frozen=True)
class StageContext:
    """What a running stage sees.

    `inputs`: name → read-only folder with the artifact's files; `kinds`: what they are, of those that a stage made.
    `workspace`: an empty folder for scratch files on the same disk. `output(name)` makes the folder of one output
    artifact. `hardware` is `workers.hardware.describe()`.
    """

    inputs: Mapping[str, Path]
    workspace: Path
    outputs: Path
    reporter: Reporter
    hardware: Mapping[str, Any]
    soft_deadline: float | None = None  # `time.monotonic()` by which a stage that can stop earlier should
    kinds: Mapping[str, str] = field(default_factory=dict)

    def seconds_left(self) -> float:
        """Until the soft deadline; infinite without one. A stage that cuts its work short because of it answers with
        `reusable=False`: the deadline is no part of its key."""
        return math.inf if self.soft_deadline is None else self.soft_deadline - time.monotonic()

    def output(self, name: str) -> Path:
        path = self.outputs / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def only_file(self, name: str) -> Path:
        """The single file of input artifact `name`."""
        (path,) = sorted(self.inputs[name].iterdir())
        return path


@dataclass(frozen=True)
class StageResult:
    """`outputs`: names of the artifacts written below `ctx.output(name)` (flat folders, at least one file each).
    `data`: JSON of what was found out (never NaN or Infinity); it is cached with the outputs and goes into the
    report."""

    outputs: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    # False: true of this one run (a noisy measurement). The job that made it may go on from it, no other may.
    reusable: bool = True


class Stage(ABC, Generic[OptionsT]):
    """One step of the pipeline. A subclass registers itself under `name`.

    `version` goes up whenever the code's output for the same inputs may change. `libraries` are the distributions whose
    versions are part of the key. `hardware_bound` says that the result depends on the machine.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Options: ClassVar[type[StageOptions]]
    distribution: ClassVar[str] = ""  # that it is of, where that is another package; its version is part of the key
    libraries: ClassVar[tuple[str, ...]] = ()
    hardware_bound: ClassVar[bool] = False
    exclusive_device: ClassVar[bool] = False  # a measurement: one at a time on a device
    loopback: ClassVar[bool] = False  # it speaks TCP with processes of its own; no other stage has any network
    # What it is to the rest: nobody asks for its name.
    reads: ClassVar[str] = "model"  # the input that what the step before it made goes into
    takes: ClassVar[tuple[str, ...]] = (ONNX,)  # kinds that this may be, the preferred one first
    gives: ClassVar[Mapping[str, str]] = {}  # kinds of its outputs, by name
    weight: ClassVar[float] = 1.0  # its share of a job's progress; a build has 1
    makes_engine: ClassVar[bool] = False  # its options name the backend that builds
    rounds: ClassVar[bool] = False  # what comes out stores or computes in fewer bits
    serves_rounding: ClassVar[bool] = False  # it is of use only to a later step that rounds
    # Input → output of an earlier call with the same options but for `exclude_nodes`, which saves it a calibration.
    reuses: ClassVar[Mapping[str, str]] = {}
    reported: ClassVar[tuple[str, ...]] = ()  # of its `data`, what the report shows of a candidate's step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)

    @classmethod
    def accepts(cls, options: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG003
        """`takes` of a call with these options."""
        return cls.takes

    @classmethod
    def kinds(cls, options: Mapping[str, Any]) -> Mapping[str, str]:  # noqa: ARG003
        """`gives` of a call with these options."""
        return cls.gives

    @classmethod
    def rounding(cls, options: Mapping[str, Any]) -> Rounding | None:  # noqa: ARG003
        """How accuracy may be won back where a call with these options rounds to few levels; None where it does not."""
        return None

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:
        """What a candidate's step with these options is called where its gain is told, and what stands in its place
        when it is left out."""
        told = str(options.get("recipe", cls.name)).replace("_", " ")
        return StepPart(f"{cls.name} ({told})")

    @abstractmethod
    def run(self, ctx: StageContext, options: OptionsT) -> StageResult:
        """Do the work. Raises `app.domain.failures.StageFailure`; any other exception is a typed `internal` failure."""


@dataclass(frozen=True)
class TensorSpec:
    """A model input or output: ONNX-style lower-case dtype (`float32`, `int64`, …), shape with symbolic dims as str.

    `values`: where the graph bounds the whole numbers that an input may hold (ids of a table, lengths), the lowest and
    the highest of them; a symbolic dimension as the highest means one below its size, or its size for lengths (where
    the lowest is 1)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    values: tuple[int, int | str] | None = field(default=None, compare=False)


WARM_UP_RUNS = 5  # of a profiled session, which count for nothing


@dataclass(frozen=True)
class LayerTime:
    """Median time of one layer (a node of the engine's graph as the runtime executes it) in one inference."""

    name: str
    op_type: str
    ms: float


class Session(ABC):
    """A loaded engine that runs. One thread at a time."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    @abstractmethod
    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name; raises StageFailure(`inference_failed`)."""

    def call(self, feeds: Arrays) -> Callable[[], Any]:
        """What a call of the `run` that the bundle's `infer.py` loads does on these feeds, step by step: arrays in,
        arrays of their own out. What the benchmark times, and the verdict goes by."""
        return lambda: self.run(feeds)

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        """The cheapest honest call that runs once on these feeds: inputs bound before, outputs left where they are.
        It stands beside `call` in the figures."""
        return self.call(feeds)

    def profile(self, feeds: Arrays) -> Mapping[str, Any] | None:  # noqa: ARG002
        """Where the time of one run goes, in ms, where the device can tell: on a GPU `h2d_ms`, `compute_ms`, `d2h_ms`
        (by its own events) and `enqueue_ms` (the CPU's part). A pass of its own, never the benchmark."""
        return None

    def close(self) -> None:  # noqa: B027  (optional: most sessions free on collection)
        """Free what the session holds."""


@dataclass(frozen=True)
class BackendInfo:
    """What a live worker offers with this backend: ids, versions of its libraries, devices, precisions it gains by."""

    name: str
    versions: Mapping[str, str]
    devices: tuple[str, ...]
    precisions: tuple[str, ...]


class Backend(ABC):
    """An inference library. The only home of that library's import, made inside the methods."""

    name: ClassVar[str]
    distribution: ClassVar[str] = ""  # as a stage's
    libraries: ClassVar[tuple[str, ...]] = ()  # distributions whose versions change what it builds or measures
    accepts: ClassVar[tuple[str, ...]] = (ONNX,)  # kinds of artifacts that it builds from, the preferred one first
    engine_format: ClassVar[str]  # the kind of artifact that an engine is
    reference: ClassVar[bool] = False  # graphs of its format are tried with it while they are made (`runner_of`)
    signed: ClassVar[bool] = False  # its engines are native code, and load only with the key that signed them
    plain_runtime: ClassVar[Mapping[str, Any]] = {}  # runtime options of a plain float32 session
    shares_cache: ClassVar[bool] = False  # its builds keep a cache that all workers share (`shared_caches`)
    uses_tmp: ClassVar[bool] = False  # its library writes to /tmp, whatever TMPDIR says: such a call has its own
    uses_cache: ClassVar[bool] = False  # it writes to the installation's cache folder, where no other call reaches it
    stops: ClassVar[bool] = False  # its build takes the option `max_seconds`, and ends by itself
    script_libraries: ClassVar[tuple[str, ...]] = ()  # what `infer_script` imports beside `libraries`
    script_hurry: ClassVar[tuple[str, ...]] = ()  # arguments with which its script leaves out what tells only the time
    device: ClassVar[str] = "cpu"  # where its engines run, "cpu" or "cuda": what a build or a measurement locks

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.reference = vars(cls).get("reference", False)  # not inherited: a variant of a reference is none
        register(cls)

    @abstractmethod
    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        """What it offers on this machine, or None where its library or device is missing. Never raises."""

    def import_library(self) -> None:
        """Import it, so that what a load takes can be timed without."""
        self.probe({})

    @classmethod
    def facts_of_build(cls, hardware: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG003
        """What else of the machine decides what it builds (a compiler, say), beside `workers.hardware.fingerprint`. It
        becomes part of the key."""
        return {}

    def targets(self, hardware: Mapping[str, Any]) -> Sequence[Target]:  # noqa: ARG002
        """What it builds for on this machine without having it. Never raises."""
        return ()

    @classmethod
    def built_for(cls, options: Mapping[str, Any]) -> str | None:  # noqa: ARG003
        """The target of a build with these options, where it alone decides what is built, and what is told of it,
        whatever machine builds. None: it is built for this machine."""
        return None

    @classmethod
    def members(cls, runtime: Mapping[str, Any]) -> tuple[Member, ...]:  # noqa: ARG003
        """The engines that it loads with this `runtime`, where those are several."""
        return ()

    @abstractmethod
    def propose(self, case: Case) -> Proposal:
        """What is worth trying for this case, in this backend's recipes. Pure: imports no library. Ids are unique over
        all backends (they start with a short name of the backend)."""

    def lacking(self, case: Case) -> Sequence[Skipped]:  # noqa: ARG002
        """What the report of a worker that does not offer it is to say of it. Pure, as `propose`."""
        return ()

    @abstractmethod
    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        """The same engine under other runtime options (threads, spinning, streams) that may beat its defaults here."""

    @abstractmethod
    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """`runtime` with `threads` compute threads, for one of several instances that share the machine. A backend
        whose work does not run on CPU threads answers it as it is."""

    @abstractmethod
    def build(
        self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter, kind: str = ONNX
    ) -> dict[str, Any]:
        """Make the engine for this hardware from folder `model`, an artifact of this `kind`, into folder `out`.
        Returns JSON: at least `{"runtime": {...}}`, the options that `load` needs (session options, threads)."""

    @abstractmethod
    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Load the engine in folder `engine` with the `runtime` that `build` returned."""

    def layer_times(
        self,
        engine: Path,  # noqa: ARG002  (for those that can)
        runtime: Mapping[str, Any],  # noqa: ARG002
        feeds: Arrays,  # noqa: ARG002
        runs: int,  # noqa: ARG002
    ) -> list[LayerTime] | None:
        """Where one inference spends its time, the slowest layer first: medians of `runs` runs with the library's own
        profiler, after some to warm up; None where it has none. Profiling slows the engine: shares are of use as long
        as the sum is not much more than what the engine takes without."""
        return None

    def examines(self, hardware: Mapping[str, Any]) -> bool:
        """Whether `examine` answers on this machine: where the backend runs on the machine's own processor. One whose
        engines need a device that is not here may know a way without. Never raises."""
        return ONNX in self.accepts and self.device == Backend.device and self.probe(hardware) is not None

    def examine(self, model: Path, scratch: Path, reporter: Reporter, seconds: float) -> Examined:  # noqa: ARG002
        """What it takes of the ONNX model in this folder: here by building and loading it plainly. What it refuses is
        an answer; StageFailure of kind INFRASTRUCTURE is raised. `scratch`: an empty folder.
        `seconds`: after which one that can answer with less does."""
        out = scratch / "engine"
        out.mkdir()
        how = f"built and loaded by {self.name}"
        try:
            self.load(out, self.build(model, out, {}, reporter)["runtime"]).close()
        except StageFailure as failure:
            if failure.kind is FailureKind.INFRASTRUCTURE:
                raise
            return Examined(False, how, [Refused.of(failure)])
        return Examined(True, how)

    def in_triton(self, instances: Instances) -> InTriton:  # noqa: ARG002
        """How Triton loads the engine so that it computes what was measured."""
        return InTriton(why=f"Triton has no backend for {self.name} engines")

    @abstractmethod
    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        """Source of a runnable `infer.py` for the bundle: loads the engine beside it, reads an .npz, writes an .npz."""


_STAGES: dict[str, type[Stage[Any]]] = {}
_BACKENDS: dict[str, type[Backend]] = {}


def register(cls: type[Any]) -> None:
    """Known from now on; a subclass of `Stage` or `Backend` that has a name is when it is made. Raises
    `registry.AlreadyRegistered`."""
    registry.enter(_STAGES if issubclass(cls, Stage) else _BACKENDS, cls)


def registered() -> set[type[Any]]:
    """All stages and backends that are known so far."""
    return {*_STAGES.values(), *_BACKENDS.values()}


def unregister(classes: Iterable[Any]) -> None:
    """Forget stages and backends that turned out to be of no use."""
    unwanted = {*classes}
    for table in (_STAGES, _BACKENDS):
        for name in [name for name, there in table.items() if there in unwanted]:
            del table[name]


def _load_all(package: str) -> None:
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")


def _load_plugins(group: str) -> None:
    importlib.import_module("workers.plugins").load(group)  # it imports this module


def stages() -> Mapping[str, type[Stage[Any]]]:
    """All stages by name: every one of `workers/stages`, and those of other packages (`workers.plugins`)."""
    _load_all("workers.stages")
    _load_plugins("anneal.stages")
    return _STAGES


def backends() -> Mapping[str, type[Backend]]:
    """All backends by name: every one of `workers/backends`, and those of other packages (`workers.plugins`). Their
    libraries are imported only when used."""
    _load_all("workers.backends")
    _load_plugins("anneal.backends")
    return _BACKENDS


def runner_of(kind: str) -> Backend:
    """The backend that loads an artifact of this kind as it is, on the machine's own processor: what a graph is tried
    with. It says so itself (`reference`): the order of registration, which a plug-in may come first in, decides
    nothing."""
    return next(b for b in backends().values() if b.reference and b.engine_format == kind)()
