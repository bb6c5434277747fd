"""Backends, as a package of their own has them, for models that only add constants (`examples/plugin`): one waits for
every sample, the other as long for any batch. So one wins at small batches and the other at large ones, by far. The
third one builds from the graph itself, which may so be one of several that a chain was cut into, and wins everywhere.

`waiting_toys.txt` beside this module says what a call of the original takes on this machine, in seconds: waits of fixed
lengths would win at every batch size where the original is slow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from anneal_toy import Fold, FoldOptions, ToyBackend, ToySession

from workers.artifacts import ONNX
from workers.backends.bundle_script import infer_script
from workers.candidates import Candidate, Case, Proposal, Step
from workers.kernel import BackendInfo, Reporter, Session, StageContext

_ORIGINAL_S = float(Path(__file__).with_suffix(".txt").read_text())

_LOADER = '''
EACH, ANY = __WAITS__  # seconds


def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name; waiting needs no threads."""
    told, total = json.loads((HERE / "sum.json").read_text()), np.load(HERE / "sum.npy", allow_pickle=False)
    (given,), (made,) = told["inputs"], told["outputs"]

    def run(feeds):
        array = feeds[given["name"]]
        time.sleep(EACH * len(array) + ANY)
        return {made["name"]: array + total}

    return [given["name"]], run
'''


class _Slow(ToySession):
    def __init__(self, folder: Path, waits: tuple[float, float]) -> None:
        super().__init__(folder)
        self._each, self._any = waits

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(self._each * len(feeds[self.inputs[0].name]) + self._any)
        return super().run(feeds)

    def call(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        return lambda: self.run(feeds)


class _Toy(ToyBackend):
    waits: ClassVar[tuple[float, float]]  # seconds, of each sample and of any call
    steps: ClassVar[tuple[Step, ...]] = (Step("toy_fold", {}),)

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        found = super().probe(hardware)
        return None if found is None else BackendInfo(self.name, found.versions, found.devices, found.precisions)

    def propose(self, case: Case) -> Proposal:
        what = f"waits {self.waits}"
        return Proposal((Candidate(f"{self.name}-sum", what, self.name, "fp32", self.steps, lossless=True),))

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        return _Slow(engine, self.waits)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        waits = json.dumps(list(self.waits))
        return infer_script(library="nothing else", imports="", loader=_LOADER.replace("__WAITS__", waits))


class PerSample(_Toy):
    name: ClassVar[str] = "toy-per-sample"
    waits: ClassVar[tuple[float, float]] = (0.25 * _ORIGINAL_S, 0.0)


class AnyBatch(_Toy):
    name: ClassVar[str] = "toy-any-batch"
    waits: ClassVar[tuple[float, float]] = (0.0, 0.5 * _ORIGINAL_S)


class OfAnyGraph(_Toy):
    """It adds up by itself: a step's result of a format of its own cannot be cut into the models of a chain."""

    name: ClassVar[str] = "toy-any-graph"
    accepts: ClassVar[tuple[str, ...]] = (ONNX,)
    steps: ClassVar[tuple[Step, ...]] = ()
    waits: ClassVar[tuple[float, float]] = (0.0, 0.01 * _ORIGINAL_S)

    def build(
        self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter, kind: str = ONNX
    ) -> dict[str, Any]:
        with TemporaryDirectory() as scratch:
            context = StageContext({"model": model}, Path(scratch), Path(scratch), reporter, {})
            (made,) = Fold().run(context, FoldOptions()).outputs
            return super().build(Path(scratch) / made, out, options, reporter, kind)
