"""Never slower, never worse: fifty seeded regressions through the real stages and the verdict. All must be stopped.

The original computes the same as the engine `fast`, and much else besides that it throws away. So every candidate here
but the slowed ones is really faster: what stops it is its fault alone.
"""

from __future__ import annotations

import io
import signal
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import onnx_models
from tests.factories.faulty import FaultyBackend
from workers.data import part_of, sample_digests
from workers.hardware import describe
from workers.kernel import Reporter, StageContext
from workers.measure import figures
from workers.measure.engine_child import WarmUp
from workers.measure.rounds import Timing
from workers.pipeline.select import BASELINE, Tried, judge
from workers.stages.benchmark import Benchmark, BenchmarkOptions
from workers.stages.validate import Validate, ValidateOptions

Array = np.ndarray[Any, Any]

FEATURES, CLASSES = 6, 4
STRUCK = 1.5  # samples whose first feature is above this are those that a fault strikes
FAULTY = FaultyBackend.name

# Slowed ones. `fast` engines are only slow at one batch size: elsewhere they gain.
SLOWED: dict[str, dict[str, Any]] = {
    "two-percent": {"slower": 1.02},
    "five-percent": {"slower": 1.05},
    "ten-percent": {"slower": 1.1},
    "third": {"slower": 1.33},
    "double": {"slower": 2.0},
    "triple": {"slower": 3.0},
    "sleeps": {"sleep_s": 0.0005},
    "fast-at-1": {"sleep_s": 0.002, "at_batch": 8},
    "fast-at-1-spins": {"slower": 60.0, "at_batch": 8},
    "fast-at-8": {"sleep_s": 0.002, "at_batch": 1},
}
IN_BENCHMARK: dict[str, dict[str, Any]] = {
    "crashes": {"signal_after": 40, "signal": int(signal.SIGSEGV)},
    "nan-in-benchmark": {"fault": "nan", "above": STRUCK},
}


class Quiet(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        assert 0 <= fraction <= 1

    def note(self, message: str, **facts: Any) -> None:
        assert message


def _model(*, heavy: bool, outputs: int = 1) -> ModelProto:
    """y = x · w; the original adds 0 · (a perceptron's answer). A second output z = −y on demand."""
    weights = [onnx_models.tensor("w", np.eye(FEATURES, CLASSES))]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"])]
    last = "h"
    if heavy:
        rng = np.random.default_rng(0)
        sizes, at = [FEATURES, 512, 512, 512, 512, CLASSES], "x"
        for i, (a, b) in enumerate(pairwise(sizes)):
            weights.append(onnx_models.tensor(f"w{i}", rng.standard_normal((a, b)) / 16))
            nodes.append(helper.make_node("MatMul", [at, f"w{i}"], [f"m{i}"]))
            nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]))
            at = f"t{i}"
        weights.append(onnx_models.tensor("zero", 0.0))
        nodes += [helper.make_node("Mul", [at, "zero"], ["nothing"]), helper.make_node("Add", ["h", "nothing"], ["s"])]
        last = "s"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    named = ["y"]
    if outputs == 2:
        nodes.append(helper.make_node("Neg", [last], ["z"]))
        named.append("z")
    given = [onnx_models.value("x", ["batch", FEATURES])]
    return onnx_models.make_model(nodes, given, [onnx_models.value(n, ["batch", CLASSES]) for n in named], weights)


def _samples(n: int, struck: tuple[int, ...] = (), seed: int = 1) -> Array:
    x = np.random.default_rng(seed).standard_normal((n, FEATURES)).astype(np.float32)
    x[:, 0] = np.minimum(x[:, 0], 1.0)
    x[list(struck), 0] = STRUCK + 1
    return x


def _labels(x: Array) -> Array:
    return np.asarray(x[:, :CLASSES].argmax(axis=1))


def _npz(**arrays: Array) -> bytes:
    raw = io.BytesIO()
    np.savez(raw, **arrays)  # type: ignore[arg-type]
    return raw.getvalue()


def _write(folder: Path, raw: bytes, name: str = "d.npz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: onnx_models.folder(_model(heavy=heavy, outputs=outputs), root / name)
        for name, heavy, outputs in (
            ("original", True, 1),
            ("fast", False, 1),
            ("original2", True, 2),
            ("fast2", False, 2),
        )
    }


@pytest.fixture(scope="module")
def benchmark(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """One run of the benchmark stage for all: the original, `fast` without a fault, and every one with one."""
    engines = {"fast": {}, **SLOWED, **IN_BENCHMARK}
    quick = {i for i in engines if i.startswith("fast")} | set(IN_BENCHMARK)
    inputs = {f"engine.{i}": models["fast" if i in quick else "original"] for i in engines}
    root = tmp_path_factory.mktemp("benchmark")
    ctx = StageContext({"baseline": models["original"], **inputs}, root, root / "out", Quiet(), describe())
    options = BenchmarkOptions(
        engines=[{"id": i, "backend": FAULTY, "runtime": runtime} for i, runtime in engines.items()],
        batch_sizes=[1, 8],
        min_seconds=0.24,
        rounds=6,
        cold=False,
    )
    return Benchmark().run(ctx, options).data


@pytest.fixture
def validated(models: dict[str, Path], tmp_path: Path) -> Callable[..., Mapping[str, Any]]:
    """The validate stage's data of `fast` with a fault."""

    def run(data: Path, *, model: str = "", calibration: Path | None = None, **options: Any) -> Mapping[str, Any]:
        inputs = {"model": models["original" + model], "engine": models["fast" + model], "data": data}
        if calibration is not None:
            inputs["calibration"] = calibration
        ctx = StageContext(inputs, tmp_path, tmp_path / "out", Quiet(), describe())
        runtime = options.pop("runtime", {})
        return Validate().run(ctx, ValidateOptions(backend=FAULTY, runtime=runtime, **options)).data

    return run


GOOD = {"source": "dataset", "loss_percent": 0.0, "metric": "top1", "samples": 600, "broken": None}


def _picked(
    benchmark: Mapping[str, Any],
    engine: str = "fast",
    accuracy: Mapping[str, Any] | None = GOOD,
    **spec: Any,
) -> tuple[str | None, list[str]]:
    """The verdict over the original and one candidate, and what speaks against the candidate."""
    measured = benchmark["engines"]
    baseline = Tried(BASELINE, "fp32", True, figures=measured[BASELINE])
    tried = Tried(engine, "int8", False, accuracy, measured[engine])
    # What is tried here are faults, whatever else the machine does: tests/unit/test_disturbance.py has that.
    wanted = OptimizationSpec.model_validate({"model_id": "m", "benchmark": {"allow_noisy": True}, **spec})
    verdict = judge(wanted, baseline, [tried], benchmark["aa"])
    return verdict.picked, tried.reasons


def test_without_a_fault_it_ships(
    benchmark: Mapping[str, Any], validated: Callable[..., Mapping[str, Any]], tmp_path: Path
) -> None:
    """Else the fifty below would prove nothing."""
    x = _samples(300)
    accuracy = validated(_write(tmp_path / "data", _npz(x=x, labels=_labels(x))))
    assert accuracy["loss_percent"] == 0
    for objective in ("latency", "throughput"):
        assert _picked(benchmark, accuracy=accuracy, objective=objective) == ("fast", [])


@pytest.mark.parametrize("engine", SLOWED)
def test_slowed(benchmark: Mapping[str, Any], engine: str) -> None:
    for objective in ("latency", "throughput"):
        picked, reasons = _picked(benchmark, engine, objective=objective)
        assert picked == BASELINE, benchmark["engines"][engine]["batches"]
        assert any("not faster" in r or "slower" in r for r in reasons)


@pytest.mark.parametrize(
    ("fault", "share"),
    [
        ("zeros", 0.05),
        ("negated", 0.03),
        ("permuted", 1.0),
        ("permuted", 0.02),
        ("shuffled", 1.0),
        ("shape", 1.0),
        ("rank", 0.01),
        ("dtype", 0.01),
        ("missing", 0.01),
    ],
)
def test_broken(
    benchmark: Mapping[str, Any],
    validated: Callable[..., Mapping[str, Any]],
    tmp_path: Path,
    fault: str,
    share: float,
) -> None:
    x = _samples(300, tuple(range(int(300 * share))))
    truth = {"y": x[:, :CLASSES]} if fault == "zeros" else {"labels": _labels(x)}  # zeros name class 0, which is right
    data = _write(tmp_path / "data", _npz(x=x, **truth))
    picked, reasons = _picked(benchmark, accuracy=validated(data, runtime={"fault": fault, "above": STRUCK}))
    assert picked == BASELINE
    assert reasons


def test_broken_in_the_benchmark_only(benchmark: Mapping[str, Any]) -> None:
    picked, reasons = _picked(benchmark, "crashes")
    assert picked == BASELINE
    assert "crashed" in reasons[0]


NOT_FINITE = [
    ("nan", (0,), {}),
    ("inf", (15,), {}),
    ("-inf", (16,), {}),
    ("nan_one", (99,), {}),
    ("nan_one", (42,), {"references": True}),
    ("inf", (99,), {"labels": False}),
    ("nan", (7,), {"model": "2", "output": "z"}),
    ("nan_one", (8, 108, 208), {"n": 300, "metric": "cosine"}),
    ("-inf", (99,), {"metric": "normalized_error", "labels": False}),
]


@pytest.mark.parametrize(("fault", "struck", "how"), NOT_FINITE)
def test_not_finite_on_one_sample_in_a_hundred(
    benchmark: Mapping[str, Any],
    validated: Callable[..., Mapping[str, Any]],
    tmp_path: Path,
    fault: str,
    struck: tuple[int, ...],
    how: dict[str, Any],
) -> None:
    x = _samples(how.get("n", 100), struck)
    arrays = {"x": x}
    if how.get("references"):
        arrays["y"] = x[:, :CLASSES]
    elif how.get("labels", True):
        arrays["labels"] = _labels(x)
    runtime = {"fault": fault, "above": STRUCK, "output": how.get("output", "y")}
    options = {"metric": how["metric"]} if "metric" in how else {}
    data = _write(tmp_path / "data", _npz(**arrays))
    accuracy = validated(data, model=how.get("model", ""), runtime=runtime, **options)
    assert accuracy["broken"]["code"] in ("output_nan", "output_inf")
    assert f"sample {struck[0]}" in accuracy["broken"]["detail"]
    picked, reasons = _picked(benchmark, accuracy=accuracy)
    assert picked == BASELINE
    assert "output broken" in reasons[0]


def test_not_finite_in_the_benchmark_only(benchmark: Mapping[str, Any]) -> None:
    """The validation data have no such sample; the benchmark's inputs do."""
    picked, reasons = _picked(benchmark, "nan-in-benchmark")
    assert picked == BASELINE
    assert "NaN or Inf in y" in reasons[0]


# Leaks: the engine knows what calibrated it, and is wrong on everything else. Counted in, the samples that leaked would
# carry it over the limit of 1 %.

LEAKED, FRESH = 1000, 8


def _zip(shards: list[bytes]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for i, shard in enumerate(shards):
            file.writestr(f"shard-{i}.npz", shard)
    return raw.getvalue()


def _tar(shards: list[bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as file:
        for i, shard in enumerate(shards):
            info = tarfile.TarInfo(f"shard-{i}.npz")
            info.size = len(shard)
            file.addfile(info, io.BytesIO(shard))
    return raw.getvalue()


def _shards(x: Array, count: int, *, labels: bool) -> list[bytes]:
    parts = np.array_split(x, count)
    return [_npz(x=p, **({"labels": _labels(p)} if labels else {})) for p in parts]


def _leak(kind: str, leaked: Array, fresh: Array) -> tuple[tuple[bytes, str], tuple[bytes, str]]:
    """(validation, calibration) as bytes and file name."""
    rng = np.random.default_rng(2)
    both = np.concatenate([leaked, fresh])
    judging, calibrating = (_npz(x=both, labels=_labels(both)), "d.npz"), (_npz(x=leaked), "c.npz")
    match kind:
        case "subset":
            pass
        case "permuted":
            mixed = both[rng.permutation(len(both))]
            judging = (_npz(x=mixed, labels=_labels(mixed)), "d.npz")
            calibrating = (_npz(x=leaked[::-1]), "c.npz")
        case "duplicated in calibration":
            calibrating = (_npz(x=np.repeat(leaked, 3, axis=0)), "c.npz")
        case "duplicated in validation":
            twice = np.concatenate([leaked, both, leaked])
            judging = (_npz(x=twice, labels=_labels(twice)), "d.npz")
        case "validation in shards":
            judging = (_zip(_shards(both, 7, labels=True)), "d.zip")
        case "calibration in shards":
            calibrating = (_tar(_shards(leaked, 5, labels=False)), "c.tar")
        case "with labels, and more of its own":
            more = np.concatenate([_samples(50, seed=9), leaked])
            calibrating = (_npz(x=more, labels=_labels(more)), "c.npz")
        case "big-endian, Fortran order":
            calibrating = (_npz(x=np.asfortranarray(leaked).astype(">f4")), "c.npz")
        case _:
            raise ValueError(kind)
    return judging, calibrating


@pytest.mark.parametrize(
    "kind",
    [
        "subset",
        "permuted",
        "duplicated in calibration",
        "duplicated in validation",
        "validation in shards",
        "calibration in shards",
        "with labels, and more of its own",
        "big-endian, Fortran order",
    ],
)
def test_leaked(
    benchmark: Mapping[str, Any], validated: Callable[..., Mapping[str, Any]], tmp_path: Path, kind: str
) -> None:
    leaked = _samples(LEAKED, seed=3)
    fresh = _samples(FRESH, tuple(range(FRESH)), seed=4)
    judging, calibrating = _leak(kind, leaked, fresh)
    judge_with = partial(
        validated,
        _write(tmp_path / "data", *judging),
        runtime={"fault": "permuted", "above": STRUCK},
        max_samples=10_000,
    )
    assert _picked(benchmark, accuracy=judge_with())[0] == "fast", "the leak would not matter"
    accuracy = judge_with(calibration=_write(tmp_path / "calibration", *calibrating))
    assert accuracy["samples"] == FRESH
    assert accuracy["left_out"] >= LEAKED
    assert _picked(benchmark, accuracy=accuracy)[0] == BASELINE


def test_leaked_altogether(validated: Callable[..., Mapping[str, Any]], tmp_path: Path) -> None:
    """Nothing is left to judge by: an error of the data, and no candidate."""
    x = _samples(100)
    data = _write(tmp_path / "data", _npz(x=x, labels=_labels(x)))
    with pytest.raises(StageFailure) as caught:
        validated(data, calibration=_write(tmp_path / "c", _npz(x=x[np.random.default_rng(0).permutation(100)])))
    assert (caught.value.code, caught.value.kind) == ("dataset_empty", FailureKind.DATA)


def test_leaked_by_one_data_set_for_both(
    benchmark: Mapping[str, Any], validated: Callable[..., Mapping[str, Any]], tmp_path: Path
) -> None:
    """Given for both, it is split: what stands on the calibration side does not judge."""
    pool = _samples(2000, seed=5)
    strange = _samples(40, tuple(range(40)), seed=6)
    calibrates = [part_of(d) == "calibration" for d in sample_digests({"x": pool})]
    judges = [part_of(d) == "validation" for d in sample_digests({"x": strange})]
    x = np.concatenate([pool[calibrates], strange[judges][:FRESH]])
    judge_with = partial(
        validated,
        _write(tmp_path / "data", _npz(x=x, labels=_labels(x))),
        runtime={"fault": "permuted", "above": STRUCK},
    )
    assert _picked(benchmark, accuracy=judge_with())[0] == "fast", "the leak would not matter"
    accuracy = judge_with(part="validation")
    assert accuracy["samples"] == FRESH
    assert _picked(benchmark, accuracy=accuracy)[0] == BASELINE


# A noisy machine: latencies made up, figures and verdict real.

ROUNDS, CALLS = 10, 40


def _noisy(kind: str, rng: np.random.Generator) -> tuple[list[Array], list[Array], list[Array]]:
    """Latencies in ms, one array per round: of the baseline, of its second process, and of the candidate."""

    def calls(scale: float | Array = 1.0, sigma: float = 0.05, rounds: int = ROUNDS, n: int = CALLS) -> list[Array]:
        scales = np.broadcast_to(scale, rounds)
        return [s * np.exp(rng.normal(0, sigma, n)) for s in scales]

    match kind:
        case "drift of all":  # the machine grows slower; whoever comes first in a round looks better
            drift = np.linspace(1, 2, ROUNDS)
            return (
                calls(drift * rng.uniform(1, 1.1, ROUNDS)),
                calls(drift),
                calls(drift * rng.uniform(0.98, 1.1, ROUNDS)),
            )
        case "one process of the baseline slower":
            return calls(1.1), calls(1.0), calls(1.0)
        case "the other process slower":
            return calls(1.0), calls(1.1), calls(0.99)
        case "bursts":  # a neighbour strikes one in three windows, whosever it is
            hit = [np.where(rng.random(ROUNDS) < 0.33, 2.0, 1.0) for _ in range(3)]
            return calls(hit[0]), calls(hit[1]), calls(hit[2])
        case "bimodal":  # two clock speeds, drawn anew for every window
            modes = [rng.choice([0.8, 1.2], ROUNDS) for _ in range(3)]
            return calls(modes[0]), calls(modes[1]), calls(modes[2])
        case "bimodal calls":
            mixed = [[np.where(rng.random(CALLS) < 0.5, x * 0.7, x) for x in calls()] for _ in range(3)]
            return mixed[0], mixed[1], mixed[2]
        case "a gain below what the baseline shows against itself":
            return calls(1.15), calls(1.0), calls(0.97)
        case "few samples":
            return calls(1.0, 0.3, 5, 1), calls(1.0, 0.3, 5, 1), calls(0.95, 0.3, 5, 1)
        case "a gain in wide noise":
            wide = [calls(f * np.exp(rng.normal(0, 0.25, ROUNDS)), 0.3) for f in (1.0, 1.0, 0.95)]
            return wide[0], wide[1], wide[2]
        case "one lucky round":
            lucky = np.ones(ROUNDS)
            lucky[rng.integers(ROUNDS)] = 0.2
            return calls(), calls(), calls(lucky)
        case _:
            raise ValueError(kind)


NOISE = [
    "drift of all",
    "one process of the baseline slower",
    "the other process slower",
    "bursts",
    "bimodal",
    "bimodal calls",
    "a gain below what the baseline shows against itself",
    "few samples",
    "a gain in wide noise",
    "one lucky round",
]


def _made_up(kind: str, seed: int, faster: float = 1.0) -> Mapping[str, Any]:
    """What the benchmark stage would have said of these latencies, at one batch size."""
    *both, engine = _noisy(kind, np.random.default_rng(seed))
    made = [*both, [r / faster for r in engine]]
    timings = [
        Timing(WarmUp(50, 1.0, True, 1e6), [], [np.asarray(r * 1e6, np.int64) for r in rounds]) for rounds in made
    ]
    baseline, again, engine = timings
    common = {"size_bytes": 1000, "peak_memory_mb": None}
    return {
        "engines": {
            BASELINE: {"batches": {"1": {**figures.latency_figures(baseline, 1), **figures.itself()}}, **common},
            "noisy": {
                "batches": {
                    "1": {
                        **figures.latency_figures(engine, 1),
                        **figures.comparison(baseline, again, engine, seed),
                    }
                },
                **common,
            },
        },
        "aa": {"1": figures.a_a(baseline, again, seed).to_json()},
    }


@pytest.mark.parametrize("kind", NOISE)
def test_noisy_machine(kind: str) -> None:
    for objective in ("latency", "throughput"):
        picked, reasons = _picked(_made_up(kind, NOISE.index(kind)), "noisy", objective=objective)
        assert picked == BASELINE
        assert any("not faster with confidence" in r for r in reasons)


@pytest.mark.parametrize("kind", NOISE)
def test_a_gain_beyond_the_noise_ships(kind: str) -> None:
    """The rule is no refusal of everything: a gain that the noise cannot explain is seen through it."""
    assert _picked(_made_up(kind, NOISE.index(kind), faster=10), "noisy")[0] == "noisy"


def test_there_are_fifty() -> None:
    broken = 9 + 1
    leaked = 8 + 2
    assert len(SLOWED) + broken + len(NOT_FINITE) + 1 + leaked + len(NOISE) == 50
