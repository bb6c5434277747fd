"""Quantization-aware training beside post-training int8, on models that the latter breaks: a depthwise CNN, a small
ViT, an embedding model and a detector; a CNN whose channels cannot be brought to like size; and one that could have
learned more, with labels and without.

    python benchmarks/training.py                    # about 20 minutes on two cores: losses
    python benchmarks/training.py --only detector    # one of them
    python benchmarks/training.py --speed            # about a minute on a quiet machine: speeds of what was made

The models are trained here on scikit-learn's digits, and made brittle by a step that changes nothing they compute
(`_brittle.py`). The stages of a job make of each, for both backends of x86: int8 as calibration leaves it; int8 mended
(equalized, or with the most sensitive nodes in float32, as few as hold the limit on samples that do not judge); int8 of
trained weights; and these with nodes kept, where they alone do not hold. The loss is the job's metric against the
original, on samples that had no part in anything. `off`: how far the engine of trained weights is from what training
simulated, on the same samples: the same graph, each node computed by itself in float32. Which nodes an engine computes
is told beside each. Speeds are of one sample at a time, in turns, with each backend's default threads. Files and
figures are kept in `--folder`.

Goal: within 1 % at 95 % of full int8's speed or more, on three of the first four, where calibration misses the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import ROOT, CannotMeasure, execute, parser, say, table, verdict

import workers.stages  # noqa: F401  (they register themselves)
from workers import recipes
from workers.artifacts import OPENVINO_IR
from workers.candidates import INT8_FLAGS
from workers.data import LABELS
from workers.graph.interpreter import open_session
from workers.graph.onnx_files import MODEL_FILE, read_skeleton
from workers.hardware import describe
from workers.kernel import Reporter, StageContext, backends, stages
from workers.measure.pieces import load_session
from workers.search.limits import ALPHAS
from workers.search.ranking import in_order

LIMIT, OF_FULL, GOAL = 1.0, 0.95, 3
KEPT = (1, 2, 4, 8, 16)
RUNTIME: Mapping[str, Mapping[str, Any]] = {"onnxruntime": {}, "openvino": {"inference_precision": "f32"}}
ROUNDS, CALLS = 15, 200
ALIKE = 256  # samples on which engines are compared with what training simulated

Json = dict[str, Any]


class Silent(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


class Calls:
    """Stage calls, each with a folder of its own below `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.count, self.hardware = root, 0, describe()

    def __call__(self, stage: str, inputs: Mapping[str, Path], **options: Any) -> tuple[Json, Path, float]:
        """(data, folder of the outputs, seconds)."""
        self.count += 1
        folder = self.root / f"{self.count}-{stage}"
        (folder / "work").mkdir(parents=True)
        kinds = {"model": OPENVINO_IR} if stage == "build" and (inputs["model"] / "model.xml").exists() else {}
        context = StageContext(dict(inputs), folder / "work", folder / "out", Silent(), self.hardware, None, kinds)
        made = stages()[stage]
        began = time.perf_counter()
        result = made().run(context, made.Options.model_validate(options))
        return dict(result.data), folder / "out", time.perf_counter() - began


@dataclass(frozen=True)
class Trained:
    """Folders of what one training made: its graph in float32, what quantizing that found, and the int8 graph."""

    floats: Path
    ranges: Path
    graph: Path
    told: Json
    seconds: float


class Model:
    """What is made of one model. `figures`: by backend and way, {loss, engine, seconds, …}."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        import _brittle

        self.name, self.arguments = name, arguments
        made = _brittle.files(name, folder / "files")
        self.call, self.metric = Calls(folder / "calls"), made.metric
        self.source, self.training, self.judging = (self._alone(p) for p in (made.model, made.training, made.judging))
        self.labelled = None if made.labelled is None else self._alone(made.labelled)
        data, out, _ = self.call("export", {"source": self.source, "data": self.judging}, format="pt2")
        self.original, self.program = out / "model", out / "program"
        self.kind = data["structure"]["kind"]
        wanted = recipes.CNN_STATIC_OPS if self.kind == "cnn" else recipes.TRANSFORMER_STATIC_OPS
        self.op_types = [op for op in wanted if data["structure"]["ops"].get(op)]
        # As jobs have it: without dot products of bytes the sums of products of eight bits may saturate.
        reduced = not INT8_FLAGS & {*self.call.hardware["isa"]}
        self.int8: Json = {"recipe": "static_int8", "op_types": self.op_types, "reduce_range": reduced}
        _, out, _ = self.call("simplify", {"model": self.original})
        self.simplified = out / "model"

    def _alone(self, path: Path) -> Path:
        folder = self.call.root / path.stem
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
        return folder

    def measured(self) -> Json:
        found: Json = {backend: {} for backend in RUNTIME}
        ranked = self._ranked({"model": self.simplified})
        for backend, ways in found.items():
            ways["float32"] = self._judged(backend, self.simplified, 0.0)
            ways["calibrated"] = self._calibrated(backend, [])
            say(f"{self.name}, {backend}: int8 loses {ways['calibrated']['loss']:.2f} %")
            missed = ways["calibrated"]["loss"] > LIMIT and not self.arguments.unmended
            ways["mended"] = self._mended(backend, ranked) if missed else None
        trained = self._trained(self.training)
        for backend, ways in found.items():
            ways["trained"] = self._judged(backend, trained.graph, trained.seconds)
            ways["trained"]["off"] = self._off(backend, ways["trained"], trained.graph)
            say(f"{self.name}, {backend}: trained, it loses {ways['trained']['loss']:.2f} %")
            ways["trained, kept"] = self._kept(backend, trained) if ways["trained"]["loss"] > LIMIT else None
        told = {"training": trained.told, "judging": str(self.judging)}
        if self.labelled is not None:
            trained = self._trained(self.labelled)
            told["training with labels"] = trained.told
            for backend, ways in found.items():
                ways["with labels"] = self._judged(backend, trained.graph, trained.seconds)
        return {"ways": found, **told}

    def _ranked(self, inputs: Mapping[str, Path]) -> list[str]:
        options = {**self.int8}
        if self.metric == "normalized_error":
            options["metric"] = self.metric
        data, _, _ = self.call("sensitivity", {**inputs, "calibration": self.training}, **options)
        return list(in_order(data["nodes"], squared=data["metric"] == "normalized_error")[0])

    def _calibrated(self, backend: str, kept: Sequence[str], part: str = "confirm") -> Json:
        inputs = {"model": self.simplified, "calibration": self.training}
        began = time.perf_counter()
        if backend == "onnxruntime":
            _, out, _ = self.call("quantize", inputs, **self.int8, exclude_nodes=[*kept])
        else:
            transformer = self.kind == "transformer"
            _, out, _ = self.call(
                "quantize_nncf",
                inputs,
                preset="mixed" if transformer else "performance",
                model_type="transformer" if transformer else None,
                method="minmax",
                exclude_nodes=[*kept],
            )
        return self._judged(backend, out / "model", time.perf_counter() - began, part)

    def _mended(self, backend: str, ranked: Sequence[str]) -> Json | None:
        """Equalized, where there are products; else as few of the most sensitive nodes as keep the limit on the samples
        that select. Judged on the others."""
        for alpha in ALPHAS if backend == "onnxruntime" and {"MatMul", "Gemm"} & {*self.op_types} else ():
            if self._equalized(alpha, "select")["loss"] <= LIMIT:
                return {**self._equalized(alpha), "how": f"equalized {alpha}"}
        for count in KEPT:
            if count >= len(ranked):
                break
            if self._calibrated(backend, ranked[:count], "select")["loss"] <= LIMIT:
                return {**self._calibrated(backend, ranked[:count]), "how": f"{count} of {len(ranked)} kept"}
        return None

    def _equalized(self, alpha: float, part: str = "confirm") -> Json:
        inputs = {"model": self.simplified, "calibration": self.training}
        _, out, seconds = self.call("equalize", inputs, alpha=alpha)
        inputs["model"] = out / "model"
        _, out, more = self.call("quantize", inputs, **self.int8)
        return self._judged("onnxruntime", out / "model", seconds + more, part)

    def _trained(self, training: Path) -> Trained:
        options = {
            "op_types": self.op_types,
            "reduce_range": self.int8["reduce_range"],
            "metric": self.metric,
            "seconds": float(self.arguments.training_seconds),
            "epochs": self.arguments.epochs,
            "learning_rate": self.arguments.learning_rate,
        }
        inputs = {"model": self.program, "training": training, "data": self.judging}
        data, out, seconds = self.call("train", inputs, **options)
        _, out, more = self.call("export", {"source": out / "model", "data": self.judging}, format="pt2")
        _, out, simplifying = self.call("simplify", {"model": out / "model"})
        inputs, floats = {"model": out / "model", "calibration": self.training}, out / "model"
        _, out, quantizing = self.call("quantize", inputs, **self.int8)
        whole = seconds + more + simplifying + quantizing
        return Trained(floats, out / "ranges", out / "model", data["training"], whole)

    def _kept(self, backend: str, trained: Trained) -> Json | None:
        """Of the trained graph as few of the most sensitive nodes in float32 as keep the limit."""
        inputs = {"model": trained.floats, "calibration": self.training, "ranges": trained.ranges}
        ranked = self._ranked({"model": trained.floats, "ranges": trained.ranges})
        for count in (c for c in KEPT if c < len(ranked)):
            _, out, seconds = self.call("quantize", inputs, **self.int8, exclude_nodes=ranked[:count])
            if self._judged(backend, out / "model", 0.0, "select")["loss"] <= LIMIT:
                made = self._judged(backend, out / "model", trained.seconds + seconds)
                return {**made, "how": f"{count} of {len(ranked)} kept"}
        return None

    def _off(self, backend: str, way: Json, graph: Path) -> float:
        """The distance of the engine's first output from that of its graph, over its size."""
        import numpy as np

        interpreted = open_session(graph / MODEL_FILE)
        with np.load(next(self.judging.iterdir())) as arrays:
            feeds = {i.name: arrays[i.name][:ALIKE] for i in interpreted.get_inputs()}
        name = interpreted.get_outputs()[0].name
        session = load_session(Path(way["engine"]), backend, way["runtime"])
        found, wanted = session.run(feeds)[name], interpreted.run([name], feeds)[0]
        session.close()
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    def _judged(self, backend: str, graph: Path, seconds: float, part: str = "confirm") -> Json:
        built, out, building = self.call("build", {"model": graph}, backend=backend, options={})
        runtime = {**built["runtime"], **RUNTIME[backend]}
        inputs = {"model": self.original, "engine": out / "engine", "data": self.judging}
        options = {"backend": backend, "runtime": runtime, "metric": self.metric, "part": part, "max_samples": 2000}
        data, _, _ = self.call("validate", inputs, baseline_backend="onnxruntime", **options)
        if data["broken"] is not None:
            raise CannotMeasure(f"{self.name}: {data['broken']}")
        return {
            "loss": data["loss_percent"],
            "value": data["value"],
            "original": data["baseline_value"],
            "nodes": computed(out / "engine", backend, runtime),
            "samples": data["samples"],
            "engine": str(out / "engine"),
            "runtime": runtime,
            "seconds": seconds + building,
        }


def computed(engine: Path, backend: str, runtime: Mapping[str, Any]) -> dict[str, int]:
    """How many nodes of each kind it computes: ONNX Runtime's by op type, as it optimized them; OpenVINO's by type."""
    if backend == "onnxruntime":
        found = Counter(node.op_type for node in read_skeleton(engine / MODEL_FILE).graph.node)
        return dict(sorted(found.items()))
    session: Any = load_session(engine, backend, runtime)
    layers: dict[str, int] = session.layers()
    session.close()
    return layers


def speeds(found: Json) -> None:
    """Speed of each engine over that of its backend's full int8: medians of turns."""
    import numpy as np

    with np.load(next(Path(found["judging"]).iterdir())) as arrays:
        feeds = {n: arrays[n][:1] for n in arrays.files if n != LABELS}
    for backend, ways in found["ways"].items():
        known = {name: way for name, way in ways.items() if way is not None}
        sessions = {n: load_session(Path(w["engine"]), backend, w["runtime"]) for n, w in known.items()}
        times: dict[str, list[float]] = {name: [] for name in known}
        for turn in range(ROUNDS + 1):
            for name in sorted(known, reverse=bool(turn % 2)):
                began = time.perf_counter()
                for _ in range(CALLS):
                    sessions[name].run(feeds)
                if turn:  # the first one warms up
                    times[name].append((time.perf_counter() - began) / CALLS)
        for name, session in sessions.items():
            session.close()
            pairs = zip(times["calibrated"], times[name], strict=True)
            known[name]["of_full"] = statistics.median(full / own for full, own in pairs)
            known[name]["ms"] = 1e3 * statistics.median(times[name])


def shown(way: Json | None) -> str:
    if way is None:
        return "–"
    text = f"{way['loss']:.2f} %"
    text += f", {100 * way['of_full']:.0f} %" if "of_full" in way else ""
    return text + (f" ({way['how']})" if "how" in way else "")


WAYS = ("float32", "calibrated", "mended", "trained", "trained, kept", "with labels")


def rows(name: str, found: Json) -> list[list[str]]:
    told = found["training"]
    made = []
    for backend, ways in found["ways"].items():
        missed = ways["calibrated"]["loss"] > LIMIT
        trained = [w for w in (ways["trained"], ways.get("trained, kept")) if w is not None]
        met = any(w["loss"] <= LIMIT and w.get("of_full", 0.0) >= OF_FULL for w in trained)
        equal = f"{100 * told['agreement_before']:.1f} → {100 * told['agreement']:.1f} %"
        training = f"{told['seconds']:.0f} s, {told['steps']} steps, {equal}"
        goal = verdict(met) if missed and "of_full" in trained[0] else "–"
        made.append([name, backend, *(shown(ways.get(w)) for w in WAYS), training, goal])
    return made


def differing(name: str, found: Json) -> list[list[str]]:
    """Kinds of nodes of which the engine of trained weights computes another number than plain int8."""
    made = []
    for backend, ways in found["ways"].items():
        plain, trained = ways["calibrated"]["nodes"], ways["trained"]["nodes"]
        counts = {kind: (plain.get(kind, 0), trained.get(kind, 0)) for kind in sorted({*plain, *trained})}
        other = [f"{kind} {before} → {after}" for kind, (before, after) in counts.items() if before != after]
        made.append([name, backend, "; ".join(other) or "the same", f"{100 * ways['trained']['off']:.2f} %"])
    return made


def measure(arguments: argparse.Namespace) -> Json:
    from _brittle import NAMES

    root = arguments.folder or ROOT / "build" / "bench" / "training"
    found: Json = {}
    for name in arguments.only or NAMES:
        folder = root / name.replace(" ", "-")
        kept = folder / "figures.json"
        if not arguments.speed:
            shutil.rmtree(folder / "calls", ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(Model(name, folder, arguments).measured(), indent=1))
        if not kept.exists():
            continue
        found[name] = json.loads(kept.read_text())
        if arguments.speed:
            speeds(found[name])
            kept.write_text(json.dumps(found[name], indent=1))
    head = ["model", "backend", *WAYS, "training, agreement", "goal"]
    print(table(head, [row for name, each in found.items() for row in rows(name, each)]), end="\n\n")
    head = ["model", "backend", "nodes: int8 → trained", "off"]
    print(table(head, [row for name, each in found.items() for row in differing(name, each)]), end="\n\n")
    print(f"Loss by the job's metric, limit {LIMIT:g} %; with --speed, the speed as a share of full int8's.")
    return {"models": found}


if __name__ == "__main__":
    assert {*RUNTIME} <= {*backends()}
    options = parser(__doc__)
    options.add_argument("--only", action="append", help="a model's name; may be given several times")
    options.add_argument("--unmended", action="store_true", help="without what calibration and kept nodes win back")
    options.add_argument("--speed", action="store_true", help="time what was made before; makes nothing")
    options.add_argument("--training-seconds", type=int, default=300, help="of each training, at most")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--learning-rate", type=float, default=2e-4)
    execute(measure, options.parse_args())
