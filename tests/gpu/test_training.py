"""Quantization-aware training on a GPU: the stage in a child process, as a worker runs it. The same seed gives the same
weights, and it learns what it learns on the CPU. With `-s`: how long both took."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import programs
from workers.artifacts import PROGRAM_FILE
from workers.graph import learned_ranges
from workers.graph.exported_program import load_program
from workers.graph.interface import Interface
from workers.kernel import TensorSpec
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits, StageRequest

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

LIMITS = Limits(600, 64 << 30, 8 << 30)
ROUNDED = ["Conv", "MatMul", "Gemm", "Relu", "Add"]
SPECS = {
    "depthwise CNN": ({"image": ("float32", ("batch", 1, 24, 24))}, {"logits": ("float32", ("batch", 10))}),
    "transformer": (
        {"ids": ("int64", ("batch", "time")), "mask": ("int64", ("batch", "time"))},
        {"scores": ("float32", ("batch", 4))},
    ),
}


@pytest.fixture(scope="module")
def runner() -> Iterator[IsolatedRunner]:
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    started = IsolatedRunner()
    started.start()
    yield started
    started.close()


def made(kind: str, root: Path) -> dict[str, Path]:
    """Folders `model` (a program), `training` and `data`: a really trained network of the benchmarks with channels of
    unlike size, or one with masks and positions that the program makes itself."""
    folders = {name: root / name for name in ("model", "training", "data")}
    for name in ("training", "data"):
        folders[name].mkdir(parents=True)
    chance = np.random.default_rng(0)
    inputs, outputs = SPECS[kind]
    if kind == "transformer":
        net = programs.scores_of(programs.transformer())
        sizes = {"batch": (1, 64), "time": (2, 32)}
        programs.folder(net, folders["model"], inputs, outputs, sizes)
        for part, count in (("training", 256), ("data", 128)):
            ids, mask = chance.integers(0, 50, (count, 16)), np.ones((count, 16), np.int64)
            np.savez(folders[part] / "data.npz", ids=ids, mask=mask)
        return folders
    pytest.importorskip("sklearn")
    from benchmarks import _brittle

    found = _brittle.make(kind, root / "made", samples=800, judging=400)
    folders["model"].mkdir()
    found.model.rename(folders["model"] / PROGRAM_FILE)
    Interface(*(tuple(TensorSpec(n, t, s) for n, (t, s) in side.items()) for side in (inputs, outputs))).write(
        folders["model"]
    )
    found.training.rename(folders["training"] / "data.npz")
    found.judging.rename(folders["data"] / "data.npz")
    return folders


def trained(runner: IsolatedRunner, root: Path, folders: dict[str, Path], hardware: Any, device: str) -> Any:
    """Folder of the trained program, and what the stage told."""
    (root / "work").mkdir(parents=True)
    options = {"op_types": ROUNDED, "activations": "int8", "epochs": 4, "seed": 17, "seconds": 300.0, "device": device}
    inputs = {name: str(path) for name, path in folders.items()}
    request = StageRequest("train", options, inputs, str(root / "work"), str(root / "out"), hardware, LIMITS)
    (root / "out").mkdir()
    told = runner.run(request, on_progress=lambda *_: None, should_stop=lambda: False)
    return root / "out" / "model", dict(told.data["training"])


@pytest.mark.parametrize("kind", [*SPECS])
def test_the_same_seed_gives_the_same_weights(
    kind: str, runner: IsolatedRunner, gpu: dict[str, Any], tmp_path: Path
) -> None:
    folders = made(kind, tmp_path / "case")
    (one, told), (other, again) = (trained(runner, tmp_path / n, folders, gpu, "cuda") for n in ("one", "other"))
    _, on_cpu = trained(runner, tmp_path / "cpu", folders, gpu, "cpu")
    assert [each["device"] for each in (told, again, on_cpu)] == ["cuda", "cuda", "cpu"]
    names = ("seconds", "steps", "loss_before", "loss", "agreement_before", "agreement")
    for where, each in (("cuda", told), ("cuda again", again), ("cpu", on_cpu)):
        sys.stdout.write(f"\n{kind}, {where}: { {n: each[n] for n in names} }")
    first, second = (load_program(f / PROGRAM_FILE).state_dict for f in (one, other))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[n].detach().numpy(), second[n].detach().numpy()) for n in first)
    assert learned_ranges.read(one) == learned_ranges.read(other)
    assert told["steps"] == again["steps"]
    assert told["loss"] <= told["loss_before"]
    if kind == "depthwise CNN":
        assert told["loss"] < 0.5 * told["loss_before"], "it learns"
        assert told["agreement"] > told["agreement_before"]
