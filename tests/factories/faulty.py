"""A real engine with a fault of one's choice, for seeded regressions: slow, wrong, dying, or refusing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import ModelProto, helper

from app.domain.failures import StageFailure
from tests.factories import onnx_models
from workers.candidates import Candidate, Case, Proposal
from workers.kernel import Backend, BackendInfo, Reporter, Session, backends

Array = np.ndarray[Any, Any]


class FaultySession(Session):
    """ONNX Runtime with a fault. `how`, the runtime options:

    `sleep_s`, `per_sample_s`: seconds that every call takes longer; `slower`: by which factor it takes longer;
    `at_batch`: the only batch size at which those hold. `signal` with `signal_at_batch` or `signal_after` (calls): it
    dies. `fault`: what becomes of `output` (see `_alter`), of the samples whose first feature is above `above`.
    """

    def __init__(self, inner: Session, how: Mapping[str, Any]) -> None:
        self._inner, self._how, self._calls = inner, how, 0
        self.inputs, self.outputs = inner.inputs, inner.outputs

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        self._die(_rows(feeds))
        out = self._inner.run(feeds)
        if "fault" in self._how:
            first = next(iter(feeds.values()))
            struck = first.reshape(len(first), -1)[:, 0] > self._how.get("above", -np.inf)
            if struck.any():
                name = self._how.get("output", next(iter(out)))
                _alter(out, name, self._how["fault"], struck)
        return out

    def call(self, feeds: dict[str, Any]) -> Callable[[], Any]:
        call, rows, how = self._inner.call(feeds), _rows(feeds), self._how
        here = how.get("at_batch", rows) == rows
        pause = (how.get("sleep_s", 0.0) + how.get("per_sample_s", 0.0) * rows) if here else 0.0
        slower = how.get("slower", 1.0) if here else 1.0

        def faulty() -> None:
            self._die(rows)
            start = time.perf_counter()
            if pause:
                time.sleep(pause)
            call()
            if slower > 1:
                until = time.perf_counter() + (time.perf_counter() - start) * (slower - 1)
                while time.perf_counter() < until:
                    pass

        return faulty

    def _die(self, rows: int) -> None:
        self._calls += 1
        if rows == self._how.get("signal_at_batch") or self._calls == self._how.get("signal_after"):
            os.kill(os.getpid(), self._how["signal"])


def _rows(feeds: Mapping[str, Any]) -> int:
    return len(next(iter(feeds.values())))


def _alter(out: dict[str, Any], name: str, fault: str, struck: Array) -> None:
    values = out[name]
    match fault:
        case "nan" | "inf" | "-inf":
            values[struck] = float(fault)
        case "nan_one":  # one number of the sample
            values[np.flatnonzero(struck), 0] = np.nan
        case "permuted":
            values[struck] = np.roll(values[struck], 1, axis=-1)
        case "zeros":
            values[struck] = 0
        case "negated":
            values[struck] = -values[struck]
        case "shuffled":  # the right answers, of the wrong samples
            out[name] = np.roll(values, 1, axis=0)
        case "constant":
            values[struck] = values[0]
        case "missing":
            del out[name]
        case "shape":
            out[name] = values[:, :-1]
        case "rank":
            out[name] = values[..., None]
        case "dtype":
            out[name] = values.astype(np.float64)
        case "fails":
            raise StageFailure("inference_failed", "it does not run")
        case _:
            raise ValueError(fault)


class FaultyBackend(Backend):
    """No worker offers it; its engine is any ONNX model, its runtime options the fault."""

    name: ClassVar[str] = "test-faulty"
    engine_format: ClassVar[str] = "onnx"

    def propose(self, case: Case) -> Proposal:
        return Proposal()

    def variants(self, case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
        return ()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return dict(runtime)

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        return None

    def build(self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        return FaultySession(backends()["onnxruntime"]().load(engine, {}), runtime)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return ""


def takes_one_only() -> ModelProto:
    """Its batch axis is free by name, and a Reshape inside refuses all but one sample."""
    weights = [onnx_models.tensor("w", np.eye(6, 4)), onnx_models.tensor("shape", [1, 4], np.int64)]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["y"]),
    ]
    inputs, outputs = [onnx_models.value("x", ["batch", 6])], [onnx_models.value("y", ["batch", 4])]
    return onnx_models.make_model(nodes, inputs, outputs, weights)
