"""What is done to an exported program before Inductor compiles it: types, masks, float8; with the real torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.failures import FailureKind, StageFailure
from tests.factories import programs
from tests.unit.test_export import Notes
from workers.backends.inductor import fp8, lowering, narrowing
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder
from workers.kernel import StageContext
from workers.stages.observe import Observe, ObserveOptions

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of its own deprecations
]

TEXT = {"ids": ("int64", ("batch", "time")), "mask": ("int64", ("batch", "time"))}
SCORES = {"scores": ("float32", ("batch", 4)), "seen": ("int64", ("batch", "time"))}
DIMS = {"batch": (1, 32), "time": (2, 64)}


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("program") / "model"
    return programs.folder(programs.transformer(), root, TEXT, SCORES, DIMS)


def texts(batch: int, time: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    return {"ids": rng.integers(0, 50, (batch, time)), "mask": rng.integers(0, 2, (batch, time)) | 1}


def tensors(feeds: dict[str, Any]) -> list[Any]:
    import torch

    return [torch.from_numpy(a) for a in feeds.values()]


def far(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def casts(graph: Any) -> list[Any]:
    return [n for n in graph.graph.nodes if "to.dtype" in str(n.target)]


@pytest.mark.parametrize(("whole", "wide"), [(False, True), (True, False)])
def test_weights_are_cast_once_and_for_all(transformer: Path, whole: bool, wide: bool) -> None:
    """No call reads a float32 weight of a product; with `whole` nothing between the products is wider either,
    embeddings and masks included."""
    import torch

    source = ProgramFolder.read(transformer)
    graph = source.program.module()
    assert narrowing.lower(graph, torch.float16, whole=whole) == 11
    assert not [n for n in casts(graph) if n.args[0].op == "get_attr"]
    kept = {t.dtype for t in (*graph.parameters(), *graph.buffers())}
    assert (torch.float32 in kept) is wide
    feeds = texts(3, 16)
    feeds["mask"][1] = 0  # a row whose every token is masked is still a number
    with torch.no_grad():
        scores, seen = graph(*tensors(feeds))
    wanted, mask = programs.answers(programs.transformer(), feeds)
    assert scores.dtype == torch.float32
    assert far(scores.numpy(), wanted) < 0.01
    assert np.array_equal(seen.numpy(), mask)


def test_masks_stay_within_float16() -> None:
    """The least number of float32, as masks have it, is not infinite in float16: a row of it would be no number."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.floor = nn.Linear(8, 8), nn.Buffer(torch.full((8,), -1e30))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = (1.0 - mask.to(torch.float32)) * torch.finfo(torch.float32).min
            return torch.softmax(self.a(x) + hidden, -1), torch.softmax(self.a(x) + self.floor, -1)

    x, mask = torch.randn(2, 8), torch.zeros(2, 8, dtype=torch.int64)
    mask[0, :3] = 1
    graph = torch.export.export(Net().eval(), (x, mask)).module()
    assert narrowing.lower(graph, torch.float16, whole=True) == 2
    with torch.no_grad():
        masked, floored = graph(x, mask)
    assert torch.isfinite(masked).all()
    assert torch.isfinite(floored).all()
    assert masked[0, 3:].sum() == 0


def test_lowering_keeps_what_bears_no_narrower_type() -> None:
    """Types of inputs and outputs stay; sums of exponentials, recurrent layers and casts that the program asks for are
    computed in float32."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gru, self.b = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.a(x))
            z, _ = self.gru(y + 1)
            total = torch.logsumexp(z.to(torch.float32), -1).cumsum(-1)
            return self.b(torch.softmax(z, -1, dtype=torch.float32)), total

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        graph = torch.export.export(net, (x,)).module()
        assert narrowing.lower(graph, torch.bfloat16) == 2
        found, wanted = graph(x), net(x)
    assert [t.dtype for t in found] == [torch.float32, torch.float32]
    for a, b in zip(found, wanted, strict=True):
        assert far(a.numpy(), b.numpy()) < 0.03
    assert [n for n in graph.graph.nodes if "to.dtype" in str(n.target)]


def test_lowering_refuses_what_it_cannot_keep() -> None:
    """An operation in place that needs float32, and texts that would become source."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y.exp_()
            return torch.div(y, 2.0, rounding_mode="floor")

    program = torch.export.export(Net().eval(), (torch.randn(2, 8),))
    assert lowering.lowered(torch, program, "fp32", "cpu")
    with pytest.raises(StageFailure, match="in place") as caught:
        lowering.lowered(torch, program, "bf16", "cpu")
    assert caught.value.code == "unsupported_op"
    graph = program.module()
    (node,) = [n for n in graph.graph.nodes if "rounding_mode" in n.kwargs]
    node.kwargs = {"rounding_mode": 'floor"); system("true'}
    with pytest.raises(StageFailure, match="not compiled") as caught:
        lowering.check_texts(graph)
    assert caught.value.code == "unsafe_program"


def calibrated(model: Path, root: Path, time: int = 16) -> dict[str, float]:
    """By the stage, on 20 samples."""
    root.mkdir(parents=True)
    (root / "data").mkdir()
    np.savez(root / "data" / "data.npz", **texts(20, time))
    (root / "work").mkdir()
    ctx = StageContext({"model": model, "calibration": root / "data"}, root / "work", root / "out", Notes(), {})
    found = Observe().run(ctx, ObserveOptions(max_samples=12))
    assert found.data["products"] == 9
    assert found.data["calibration"]["samples"] == 12
    ranges = program_ranges.read(root / "out" / "model")
    assert ranges is not None
    return ranges


def test_products_in_float8(transformer: Path, tmp_path: Path) -> None:
    """As the same products on values that were rounded to float8 before, and near enough to float32."""
    import torch

    source, ranges = ProgramFolder.read(transformer), calibrated(transformer, tmp_path / "stage")
    graph = source.program.module()
    narrowing.lower(graph, torch.bfloat16, whole=True)
    plain = source.program.module()
    narrowing.lower(plain, torch.bfloat16, whole=True)
    assert fp8.quantize(graph, ranges, torch.bfloat16) == 8, "the head gives four values, which no kernel takes"
    emulated(plain, ranges)
    for batch, time in ((1, 16), (5, 9)):
        feeds = texts(batch, time)
        with torch.no_grad():
            found, same = graph(*tensors(feeds))[0].numpy(), plain(*tensors(feeds))[0].numpy()
        (wanted, _) = programs.answers(programs.transformer(), feeds)
        assert far(found, same) < 0.01
        assert 0.001 < far(found, wanted) < 0.2


def emulated(graph: Any, ranges: dict[str, float]) -> None:
    """Each product on operands that were rounded to float8 and back."""
    import torch

    def rounded(x: Any, most: float) -> Any:
        scale = most / 448
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def product(x: Any, weight: Any, bias: Any, most: float) -> Any:
        operands = rounded(x, most), rounded(weight.float(), float(weight.abs().max()))
        return torch.nn.functional.linear(*operands, bias.float()).to(x.dtype)

    for node in list(graph.graph.nodes):
        if node.name in ranges and node.args[1].meta["val"].shape[0] % 16 == 0:
            with graph.graph.inserting_before(node):
                made = graph.graph.call_function(product, (*node.args, ranges[node.name]))
            node.replace_all_uses_with(made)
            graph.graph.erase_node(node)
    graph.recompile()


def test_products_of_one_input_are_one() -> None:
    """Queries, keys and values: one product in float8, by the larger range, with and without a bias."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 48, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 7, 32)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=9)
        graph = torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()
        narrowing.lower(graph, torch.bfloat16, whole=True)
        names = [n.name for n in graph.graph.nodes if "linear" in str(n.target)]
        assert fp8.quantize(graph, dict.fromkeys(names, float(x.abs().max())), torch.bfloat16) == 3
        products = [n for n in graph.graph.nodes if "_scaled_mm" in str(n.target)]
        assert sorted(n.args[1].args[0].meta["val"].shape[0] for n in products) == [48, 48]
        for size in (4, 2):
            assert far(graph(x[:size]).numpy(), net(x[:size]).numpy()) < 0.1


def test_what_is_not_calibrated(transformer: Path, tmp_path: Path) -> None:
    """No data, a program without weights in products, values that are no numbers, and float32 beside float8."""
    import torch

    (tmp_path / "work").mkdir()
    ctx = StageContext({"model": transformer}, tmp_path / "work", tmp_path / "out", Notes(), {})
    with pytest.raises(StageFailure) as caught:
        Observe().run(ctx, ObserveOptions())
    assert (caught.value.code, caught.value.kind) == ("calibration_data_missing", FailureKind.REQUEST)
    source = ProgramFolder.read(transformer)
    with pytest.raises(StageFailure) as caught:
        lowering.lowered(torch, source.program, "fp32", "cpu", {"linear": 1.0})
    assert caught.value.code == "precision_unsupported"
    with pytest.raises(StageFailure, match="multiples of 16") as caught:
        lowering.lowered(torch, source.program, "bf16", "cpu", {"nothing": 1.0})
    assert caught.value.code == "nothing_to_convert"
    row = {"input": ("float32", ("batch", 8))}
    model = programs.folder(
        programs.linear(), tmp_path / "linear", row, {"y": ("float32", ("batch", 3))}, {"batch": (2, 4)}
    )
    rows = np.ones((5, 8), np.float32)
    assert program_ranges.observed(ProgramFolder.read(model), [{"input": rows[:4]}])["linear"] == 1.0
    rows[0, 0] = np.nan
    assert program_ranges.observed(ProgramFolder.read(model), [{"input": rows[:4]}])["linear"] == np.inf
    assert program_ranges.read(model) is None
