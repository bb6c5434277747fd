"""Quantization-aware training of exported programs, with the real torch: where it rounds, that it wins accuracy back,
that it goes on from where it was, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.failures import StageFailure
from tests.factories import programs
from tests.unit.test_export import Notes
from workers.artifacts import EXPORTED_PROGRAM, PROGRAM_FILE, TRAINING
from workers.graph.exported_program import ProgramFolder, quiet
from workers.kernel import StageContext, StageResult
from workers.stages.train import STATE_FILE, Train, TrainOptions

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of its own deprecations
]

IMAGE = {"image": ("float32", ("batch", 3, 16, 16))}
TEXT = {"ids": ("int64", ("batch", "time")), "mask": ("int64", ("batch", "time"))}
SMALL = {"input": ("float32", ("batch", 1, 8, 8))}
ROW = {"x": ("float32", ("batch", 8))}
BATCH = {"batch": (1, 64)}
CNN = ["Conv", "Gemm", "Relu", "Add", "GlobalAveragePool"]
SCORES = {"logits": ("float32", ("batch", 5))}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small products are no faster on more, and slower where something else runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Told(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        assert 0.0 <= fraction <= 1.0
        self.messages.append(message)


def _sets(
    folder: Path,
    sample: tuple[int, ...] = (1, 8, 8),
    training: int = 96,
    judging: int = 60,
    name: str = "input",
    **more: Callable[[int], Any],
) -> None:
    """`training/data.npz` and `data/data.npz`."""
    chance = np.random.default_rng(0)
    for part, count in (("training", training), ("data", judging)):
        (folder / part).mkdir(parents=True)
        arrays = {name: chance.standard_normal((count, *sample), dtype=np.float32)}
        arrays |= {key: make(count) for key, make in more.items()}
        np.savez(folder / part / "data.npz", **arrays)


def _call(folder: Path, model: Path, out: str = "out", left: float | None = None, **options: Any) -> StageResult:
    work = folder / f"{out}-work"
    work.mkdir()
    inputs = {"model": model, **{n: folder / n for n in ("training", "data") if (folder / n).is_dir()}}
    deadline = None if left is None else time.monotonic() + left
    notes = Told()
    context = StageContext(inputs, work, folder / out, notes, {}, deadline)
    known = {"op_types": CNN, "epochs": 3, "learning_rate": 5e-4, **options}
    result = Train().run(context, TrainOptions.model_validate(known))
    return replace(result, data={**result.data, "notes": notes.notes, "messages": notes.messages})


@pytest.fixture(scope="module")
def brittle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brittle")
    programs.folder(programs.brittle(), folder / "model", SMALL, SCORES, BATCH)
    _sets(folder)
    return folder


def _copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, dirs_exist_ok=True))


def _placed(net: Any, folder: Path, inputs: Any, outputs: Any, op_types: list[str]) -> Any:
    from workers.graph.qat import placement

    programs.folder(net, folder, inputs, outputs, {"batch": (1, 64), "time": (2, 32)})
    module = ProgramFolder.read(folder).program.module()
    told = placement.place(module, op_types, "uint8", 127)
    rounded = [n.args[0].name for n in module.graph.nodes if str(n.target).startswith("_round_")]
    return told, rounded, module


def test_convolutions_are_rounded_behind_what_is_fused_into_them(tmp_path: Path) -> None:
    told, rounded, _ = _placed(programs.cnn(), tmp_path / "m", IMAGE, {"y": ("float32", ("batch", 10))}, CNN)
    assert rounded == ["image", "relu", "batch_norm_1", "relu_1", "mean", "linear"]
    assert (told.activations, told.weights) == (6, 3)


def test_of_a_transformer_what_its_products_read_is_rounded(tmp_path: Path) -> None:
    outputs = {"y": ("float32", ("batch", 4)), "m": ("int64", ("batch", "time"))}
    told, rounded, module = _placed(programs.transformer(), tmp_path / "m", TEXT, outputs, ["MatMul", "Gemm"])
    assert rounded[:2] == ["layer_norm", "_attention_0"]
    assert not [name for name in rounded if name.startswith(("add", "linear"))]
    assert (told.activations, told.weights) == (9 + 2 * 4, 9)
    assert "scaled_dot_product_attention" not in {str(n.target).split(".")[-2] for n in _live(module)}


def _live(module: Any) -> list[Any]:
    module.graph.eliminate_dead_code()
    return [n for n in module.graph.nodes if n.op == "call_function" and "." in str(n.target) and n.users]


def test_attention_that_rounds_nothing_is_attention(tmp_path: Path) -> None:
    import torch
    from torch.nn import functional

    from workers.graph.qat.rounding import RoundedAttention

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8) for _ in range(3))
    module = RoundedAttention("uint8")  # it has seen nothing yet
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    for more in ({}, {"attn_mask": mask}, {"is_causal": True}, {"scale": 0.3}):
        wanted = functional.scaled_dot_product_attention(query, key, value, **more)
        assert torch.allclose(module(query, key, value, **more), wanted, atol=1e-5)


def test_activations_and_weights_round_as_the_engines_do() -> None:
    import torch

    from workers.graph.qat.rounding import RoundedActivation, RoundedWeight

    x = torch.linspace(-1.0, 3.0, 400, requires_grad=True)
    rounded = _settled(RoundedActivation("uint8"), x)
    made = rounded(x)
    assert len(made.detach().unique()) == 256
    assert bool((made == 0).any())
    assert (made - x).abs().max() <= 2 / 255 + 1e-6
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.mean() > 0.99
    assert rounded.limits() == pytest.approx((-1.0, 3.0), abs=4 / 255)
    signed = _settled(RoundedActivation("int8"), x)
    assert torch.allclose(-signed(x), signed(-x))
    weight = torch.tensor([[1.0, -0.5], [100.0, 3.0]])
    assert torch.allclose(
        RoundedWeight(0, 127)(weight), torch.round(weight * 127 / weight.amax(1, True)) * weight.amax(1, True) / 127
    )


def _settled(module: Any, x: Any) -> Any:
    module.observing = True
    module(x)
    module.observing = False
    module.settle()
    return module


def test_training_wins_accuracy_back_and_goes_on_from_its_state(brittle: Path, tmp_path: Path) -> None:
    """Two calls end where one does, bit by bit; what comes out is a program like the one that went in."""
    import torch

    folder = _copied(brittle, tmp_path / "job")
    whole = _call(folder, folder / "model", "whole", epochs=12)
    told = whole.data["training"]
    assert told["loss"] < 0.6 * told["loss_before"], told["curve"]
    assert told["agreement"] >= told["agreement_before"]
    assert told["curve"][0]["step"] == 0
    assert told["best_step"] > 0
    assert whole.reusable
    assert any("step 5 of 36: loss" in message and "agreement" in message for message in whole.data["messages"])
    first = _call(folder, folder / "model", "first", epochs=12, round=1, rounds=2)
    assert Train.kinds({"round": 1, "rounds": 2}) == {"model": TRAINING}
    assert Train.kinds({"round": 2, "rounds": 2}) == {"model": EXPORTED_PROGRAM}
    assert {p.name for p in (folder / "first" / "model").iterdir()} == {PROGRAM_FILE, "interface.json", STATE_FILE}
    assert first.data["training"]["steps"] == told["steps_planned"] / 2
    second = _call(folder, folder / "first" / "model", "second", epochs=12, round=2, rounds=2)
    _same_but_seconds(second.data["training"]["curve"], told["curve"])
    with quiet():
        made, again, before = (
            torch.export.load(str(path / PROGRAM_FILE)).state_dict
            for path in (folder / "whole/model", folder / "second/model", folder / "model")
        )
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert any(not torch.equal(made[name], before[name]) for name in made)
    json.dumps(whole.data, allow_nan=False)


def _same_but_seconds(curve: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [{**e, "seconds": 0} for e in curve] == [{**e, "seconds": 0} for e in other]


def test_a_rate_that_is_too_high_is_made_smaller(brittle: Path, tmp_path: Path) -> None:
    """From the best weights on; the same whether in one call or in two."""
    folder = _copied(brittle, tmp_path / "job")
    whole = _call(folder, folder / "model", "whole", epochs=24, learning_rate=0.2).data["training"]
    assert whole["backed_off"] >= 1
    assert whole["loss"] <= whole["curve"][0]["loss"]
    rates = [entry["learning_rate"] for entry in whole["curve"][1:]]
    assert min(rates) < 0.2 / 3
    _call(folder, folder / "model", "first", epochs=24, learning_rate=0.2, round=1, rounds=2)
    again = _call(folder, folder / "first" / "model", "second", epochs=24, learning_rate=0.2, round=2, rounds=2)
    _same_but_seconds(again.data["training"]["curve"], whole["curve"])


def test_a_trained_program_is_exported_like_an_upload(brittle: Path, tmp_path: Path) -> None:
    from workers.stages.export import Export, ExportOptions

    folder = _copied(brittle, tmp_path / "job")
    _call(folder, folder / "model", epochs=1)
    (tmp_path / "work").mkdir()
    context = StageContext(
        {Export.reads: folder / "out" / "model"}, tmp_path / "work", tmp_path / "exported", Notes(), {}
    )
    result = Export().run(context, ExportOptions(format="pt2"))
    assert result.data["checks"]["source_comparison"]["passed"]
    assert result.data["dynamic_batch"]


def test_labels_are_learned_beside_the_teacher(tmp_path: Path) -> None:
    programs.folder(programs.brittle(), tmp_path / "model", SMALL, SCORES, BATCH)
    _sets(tmp_path, labels=lambda count: np.arange(count) % 5)
    assert _call(tmp_path, tmp_path / "model", epochs=1).data["training"]["labels"] == "logits"
    (tmp_path / "wrong").mkdir()
    _sets(tmp_path / "wrong", labels=lambda count: np.arange(count) % 9)
    _refused(lambda: _call(tmp_path / "wrong", tmp_path / "model"), "training_labels_mismatch", "0 to 8", "5 classes")
    (tmp_path / "shape").mkdir()
    _sets(tmp_path / "shape", labels=lambda count: np.full((count, 3), 2))
    _refused(lambda: _call(tmp_path / "shape", tmp_path / "model"), "training_labels_mismatch", "[32, 3] do not fit")


def test_labels_teach_what_the_teacher_does_not_know(tmp_path: Path) -> None:
    """Two classes that a random teacher does not tell apart; held-out samples with labels say when it is enough."""
    import torch

    programs.folder(programs.brittle(), tmp_path / "model", SMALL, SCORES, BATCH)
    chance = np.random.default_rng(0)
    for part, count in (("training", 256), ("data", 200)):
        (tmp_path / part).mkdir()
        truth = chance.integers(0, 2, count)
        images = (chance.standard_normal((count, 1, 8, 8)) + truth[:, None, None, None]).astype(np.float32)
        np.savez(tmp_path / part / "data.npz", input=images, labels=truth)
    told = _call(tmp_path, tmp_path / "model", epochs=12, learning_rate=5e-3).data["training"]
    assert told["labels"] == "logits"
    assert told["loss"] < 0.8 * told["loss_before"]
    right = []
    for folder in (tmp_path / "model", tmp_path / "out" / "model"):
        with quiet():
            program = torch.export.load(str(folder / PROGRAM_FILE)).module()
        with torch.no_grad():
            right.append((program(torch.from_numpy(images[:64])).argmax(1).numpy() == truth[:64]).mean())
    assert right[1] > right[0] + 0.1, right


def test_targets_that_are_no_classes_are_no_labels(tmp_path: Path) -> None:
    programs.folder(programs.brittle(), tmp_path / "model", SMALL, SCORES, BATCH)
    _sets(tmp_path, labels=lambda count: np.linspace(0, 1, count, dtype=np.float32))
    assert _call(tmp_path, tmp_path / "model", epochs=1).data["training"]["labels"] is None


def test_what_judges_never_trains(brittle: Path, tmp_path: Path) -> None:
    folder = _copied(brittle, tmp_path / "job")
    with np.load(folder / "data" / "data.npz") as judging, np.load(folder / "training" / "data.npz") as training:
        both = np.concatenate([training["input"], judging["input"][:40]])
    np.savez(folder / "training" / "data.npz", input=both)
    told = _call(folder, folder / "model", epochs=1).data["training"]
    assert (told["overlapping"], told["samples"]) == (40, 96)
    shutil.copy(folder / "data" / "data.npz", folder / "training" / "data.npz")
    _refused(lambda: _call(folder, folder / "model", "same"), "training_data_too_small", "0 distinct samples")


def test_one_data_set_for_all_is_split(brittle: Path, tmp_path: Path) -> None:
    folder = _copied(brittle, tmp_path / "job")
    shutil.copy(folder / "training" / "data.npz", folder / "data" / "data.npz")
    told = _call(folder, folder / "model", epochs=1, part="calibration", shared=True).data["training"]
    assert told["overlapping"] == 0
    assert 30 < told["samples"] < 66
    assert told["held_out"] < 96 - told["samples"]


def test_data_too_small_to_hold_any_part_out(tmp_path: Path) -> None:
    programs.folder(programs.brittle(), tmp_path / "model", SMALL, SCORES, BATCH)
    _sets(tmp_path, training=40, judging=6)
    _refused(lambda: _call(tmp_path, tmp_path / "model"), "training_data_too_small", "2 held out")


def test_a_budget_too_short_is_said_before_it_begins(brittle: Path, tmp_path: Path) -> None:
    folder = _copied(brittle, tmp_path / "job")
    failure = _refused(
        lambda: _call(folder, folder / "model", epochs=1000, left=0.05),
        "training_budget_too_short",
        "not begun",
        "steps",
    )
    assert not failure.cacheable


def test_a_time_limit_makes_fewer_steps_and_says_so(
    brittle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is said to take so long that the time holds some thirty of them, of three thousand."""
    from workers.graph.qat.training import Training

    folder = _copied(brittle, tmp_path / "job")
    monkeypatch.setattr(Training, "_seconds_a_step", lambda _: 1.0)
    result = _call(folder, folder / "model", epochs=1000, seconds=50.0)
    assert 20 <= result.data["training"]["steps_planned"] <= 50
    assert not result.reusable


def test_a_loss_that_is_no_number_stops_it(brittle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once it is a failure; after weights that were better, these are taken."""
    from workers.graph.qat.training import Training

    folder = _copied(brittle, tmp_path / "job")
    monkeypatch.setattr("workers.graph.qat.training._PATIENCE", 100)
    step = Training._step
    monkeypatch.setattr(
        Training, "_step", lambda self, batch: float("nan") if self.progress.steps > 1 else step(self, batch)
    )
    _refused(lambda: _call(folder, folder / "model", "first", epochs=12), "training_diverged", "nan at step 1")
    monkeypatch.setattr(
        Training, "_step", lambda self, batch: float("nan") if self.progress.step > 30 else step(self, batch)
    )
    result = _call(folder, folder / "model", "later", epochs=12)
    assert "became nan at step 32" in result.data["training"]["ended"]
    assert 0 < result.data["training"]["best_step"] <= 31
    assert any("stopped" in note for note in result.data["notes"])


def _refused(run: Callable[[], Any], code: str, *words: str) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        run()
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in caught.value.detail
    return caught.value


def _untrainable(name: str) -> Any:
    import torch
    from torch import nn

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.fc(x)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v * 3, (self.fc(x),))

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.fc(x).detach())

    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).argmax(-1)

    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    return {"counting": Counting, "branching": Branching, "cut": Cut, "numbers": Numbers, "bare": Bare}[name]().eval()


@pytest.mark.parametrize(
    ("net", "words", "named"),
    [
        ("counting", "in place", True),
        ("branching", "branches or loops", True),
        ("cut", "grad", True),
        ("numbers", "no output holds floating-point numbers", False),
        ("bare", "no parameters", False),
    ],
)
def test_programs_that_cannot_be_trained(net: str, words: str, named: bool, tmp_path: Path) -> None:
    outputs = {"y": ("int64" if net == "numbers" else "float32", ("batch", 3))}
    programs.folder(_untrainable(net), tmp_path / "model", ROW, outputs, BATCH)
    _sets(tmp_path, (8,), name="x")
    failure = _refused(lambda: _call(tmp_path, tmp_path / "model"), "not_trainable", words)
    assert (failure.node is not None) is named
    assert "nodes kept in higher precision" in str(failure.remedy)


def test_an_operator_of_another_library_is_named(tmp_path: Path) -> None:
    import torch

    from workers.graph.qat import placement

    with torch.library._scoped_library("annealtest", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = torch.nn.Linear(8, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.ops.annealtest.twice(self.fc(x))

        with quiet():
            program = torch.export.export(Net().eval(), (torch.randn(2, 8),))
        failure = _refused(lambda: placement.check_trainable(program), "not_trainable", "annealtest.twice")
    assert failure.node == "twice"


def test_a_program_without_products_has_nothing_to_learn(tmp_path: Path) -> None:
    programs.folder(programs.linear(), tmp_path / "model", {"input": ROW["x"]}, {"y": ("float32", ("batch", 3))}, BATCH)
    _sets(tmp_path, (8,))
    _refused(lambda: _call(tmp_path, tmp_path / "model", op_types=["Conv"]), "nothing_to_train")
