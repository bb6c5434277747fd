"""Quantization-aware training beside post-training int8, on models that the latter breaks: a depthwise CNN, a small
ViT, an embedding model and a detector.

    python benchmarks/training.py                    # about 20 minutes on two cores: losses
    python benchmarks/training.py --only detector    # one of them
    python benchmarks/training.py --speed            # about a minute on a quiet machine: speeds of what was made

The models are trained here on scikit-learn's digits, and made brittle by a step that changes nothing they compute
(`_brittle.py`). The stages of a job make of each, for both backends of x86: int8 as calibration leaves it, int8 mended
(equalized, or with the most sensitive nodes in float32, as few as hold the limit on samples that do not judge), and
int8 of trained weights. The loss is the job's metric against the original, on samples that had no part in anything.
Speeds are of one sample at a time, in turns, with each backend's default threads. Files and figures are kept in
`--folder`.

Goal: within 1 % at 95 % of full int8's speed or more, on three of the four, where calibration misses the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import ROOT, CannotMeasure, execute, parser, say, table, verdict

import workers.stages  # noqa: F401  (they register themselves)
from workers import recipes
from workers.artifacts import OPENVINO_IR
from workers.hardware import describe
from workers.kernel import Reporter, StageContext, backends, stages
from workers.measure.pieces import load_session
from workers.search.limits import ALPHAS

LIMIT, OF_FULL, GOAL = 1.0, 0.95, 3
KEPT = (1, 2, 4, 8, 16)
RUNTIME: Mapping[str, Mapping[str, Any]] = {"onnxruntime": {}, "openvino": {"inference_precision": "f32"}}
ROUNDS, CALLS = 15, 200

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


class Model:
    """What is made of one model. `figures`: by backend and way, {loss, engine, seconds, …}."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        import _brittle

        self.name, self.arguments = name, arguments
        made = _brittle.files(name, folder / "files")
        self.call, self.metric = Calls(folder / "calls"), made.metric
        self.source, self.training, self.judging = (self._alone(p) for p in (made.model, made.training, made.judging))
        data, out, _ = self.call("export", {"source": self.source, "data": self.judging}, format="pt2")
        self.original, self.program = out / "model", out / "program"
        self.kind = data["structure"]["kind"]
        wanted = recipes.CNN_STATIC_OPS if self.kind == "cnn" else recipes.TRANSFORMER_STATIC_OPS
        self.op_types = [op for op in wanted if data["structure"]["ops"].get(op)]
        _, out, _ = self.call("simplify", {"model": self.original})
        self.simplified = out / "model"

    def _alone(self, path: Path) -> Path:
        folder = self.call.root / path.stem
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
        return folder

    def measured(self) -> Json:
        found: Json = {backend: {} for backend in RUNTIME}
        ranked = self._ranked()
        for backend, ways in found.items():
            ways["calibrated"] = self._calibrated(backend, [])
            say(f"{self.name}, {backend}: int8 loses {ways['calibrated']['loss']:.2f} %")
            ways["mended"] = self._mended(backend, ranked) if ways["calibrated"]["loss"] > LIMIT else None
        trained, told, seconds = self._trained()
        for backend, ways in found.items():
            ways["trained"] = self._judged(backend, trained, seconds)
            say(f"{self.name}, {backend}: trained, it loses {ways['trained']['loss']:.2f} %")
        return {"ways": found, "training": told, "judging": str(self.judging)}

    def _ranked(self) -> list[str]:
        options = {"recipe": "static_int8", "op_types": self.op_types}
        data, _, _ = self.call("sensitivity", {"model": self.simplified, "calibration": self.training}, **options)
        return [node["name"] for node in data["nodes"]]

    def _calibrated(self, backend: str, kept: Sequence[str], part: str = "confirm") -> Json:
        inputs = {"model": self.simplified, "calibration": self.training}
        began = time.perf_counter()
        if backend == "onnxruntime":
            options = {"recipe": "static_int8", "op_types": self.op_types, "exclude_nodes": [*kept]}
            _, out, _ = self.call("quantize", inputs, **options)
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
        _, out, more = self.call("quantize", inputs, recipe="static_int8", op_types=self.op_types)
        return self._judged("onnxruntime", out / "model", seconds + more, part)

    def _trained(self) -> tuple[Path, Json, float]:
        options = {
            "op_types": self.op_types,
            "metric": self.metric,
            "seconds": float(self.arguments.training_seconds),
            "epochs": self.arguments.epochs,
            "learning_rate": self.arguments.learning_rate,
        }
        inputs = {"model": self.program, "training": self.training, "data": self.judging}
        data, out, seconds = self.call("train", inputs, **options)
        _, out, more = self.call("export", {"source": out / "model", "data": self.judging}, format="pt2")
        _, out, simplifying = self.call("simplify", {"model": out / "model"})
        inputs = {"model": out / "model", "calibration": self.training}
        _, out, quantizing = self.call("quantize", inputs, recipe="static_int8", op_types=self.op_types)
        return out / "model", data["training"], seconds + more + simplifying + quantizing

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
            "samples": data["samples"],
            "engine": str(out / "engine"),
            "runtime": runtime,
            "seconds": seconds + building,
        }


def speeds(found: Json) -> None:
    """Speed of each engine over that of its backend's full int8: medians of turns."""
    import numpy as np

    with np.load(next(Path(found["judging"]).iterdir())) as arrays:
        feeds = {n: arrays[n][:1] for n in arrays.files}
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


def rows(name: str, found: Json) -> list[list[str]]:
    told = found["training"]
    made = []
    for backend, ways in found["ways"].items():
        trained, missed = ways["trained"], ways["calibrated"]["loss"] > LIMIT
        met = trained["loss"] <= LIMIT and trained.get("of_full", 0.0) >= OF_FULL
        equal = f"{100 * told['agreement_before']:.1f} → {100 * told['agreement']:.1f} %"
        training = f"{told['seconds']:.0f} s, {told['steps']} steps, {equal}"
        goal = verdict(met) if missed and "of_full" in trained else "–"
        made.append([name, backend, *(shown(ways[w]) for w in ("calibrated", "mended", "trained")), training, goal])
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
    head = ["model", "backend", "int8", "mended", "trained", "training, agreement", "goal"]
    print(table(head, [row for name, each in found.items() for row in rows(name, each)]), end="\n\n")
    print(f"Loss by the job's metric, limit {LIMIT:g} %; with --speed, the speed as a share of full int8's.")
    return {"models": found}


if __name__ == "__main__":
    assert {*RUNTIME} <= {*backends()}
    options = parser(__doc__)
    options.add_argument("--only", action="append", help="a model's name; may be given several times")
    options.add_argument("--speed", action="store_true", help="time what was made before; makes nothing")
    options.add_argument("--training-seconds", type=int, default=300, help="of each training, at most")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--learning-rate", type=float, default=2e-4)
    execute(measure, options.parse_args())
