"""What a lowered graph becomes for a GPU: the same values by other operators. Runs on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import programs
from workers.backends.inductor import narrowing, rewriting, sizes
from workers.backends.inductor.nodes import op_of
from workers.graph.exported_program import ProgramFolder

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of its own deprecations
]

SCORES = {"logits": ("float32", ("batch", 10))}
IMAGE = {"image": ("float32", ("batch", 3, 32, 32))}


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("program") / "model"
    return programs.folder(programs.convnext(blocks=2), root, IMAGE, SCORES, {"batch": (1, 64)})


def run(graph: Any, image: Any) -> Any:
    import torch

    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(graph(torch.from_numpy(image)))[0].float().numpy()


def test_windows_side_by_side_are_a_product(convnext: Path) -> None:
    """The stem, whose kernel is as large as its stride; not the depthwise convolutions."""
    import torch

    graph = ProgramFolder.read(convnext).program.module()
    narrowing.lower(graph, torch.bfloat16, whole=True)
    image = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    before = run(graph, image)
    assert rewriting.rewrite(graph) == {"patches": 1, "gelu": 2}
    assert len([n for n in graph.graph.nodes if op_of(n) == "conv2d"]) == 2
    after = run(graph, image)
    assert "product_of_windows(" in graph.code
    assert np.abs(after - before).max() <= 0.02 * np.abs(before).max(), "it may round elsewhere"


@pytest.mark.parametrize("kernel", [(2, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_of_windows_is_the_convolution(kernel: tuple[int, int], biased: bool) -> None:
    """Also where the windows leave pixels over, as convolutions do."""
    import torch

    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, 12), torch.randn(7, 5, *kernel)
    bias = torch.randn(7) if biased else None
    wanted = torch.nn.functional.conv2d(x, weight, bias, kernel)
    found = rewriting.product_of_windows(x, weight, bias, kernel)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_exact_gelu_is_kept_to_the_type_s_own_rounding() -> None:
    """Against float64; float32 is torch's own."""
    import torch

    x = torch.linspace(-12, 12, 100_001).half()
    exact = torch.nn.functional.gelu(x.double())
    found = rewriting.gelu(x)
    assert found.dtype == torch.float16
    error = (found.double() - exact).abs()
    own = (exact.half().double() - exact).abs()
    assert float((error - own).max()) <= 5e-7 + 2**-11 * 12
    assert float(error.max()) <= 2**-8, "one step of the largest numbers"
    small = x.abs() < 1
    assert float(error[small].max()) <= 2**-11
    wide = torch.randn(100)
    assert torch.equal(rewriting.gelu(wide), torch.nn.functional.gelu(wide))
    edges = rewriting.gelu(torch.tensor([float("nan"), float("inf"), -65504.0, 65504.0]).half()).float()
    assert edges[0].isnan()
    assert edges[1:].tolist() == [float("inf"), 0.0, 65504.0]


def test_the_compiler_has_the_job_s_batch_in_mind(convnext: Path) -> None:
    source = ProgramFolder.read(convnext)
    graph = source.program.module()
    assert sizes.expect_batch(graph, {"image": 0}, 24) == 1
    (image,) = [n for n in graph.graph.nodes if n.op == "placeholder"]
    extent = image.meta["val"].shape[0].node
    assert int(extent.shape_env.backed_var_to_val[extent.expr]) == 24
    assert sizes.expect_batch(graph, {"image": 1}, 24) == 0, "three channels, whatever is expected"
    assert sizes.expect_batch(graph, {"image": None, "other": 0}, 24) == 0
    assert source.batch_sizes(512)[1] == 64, "no more than it takes"
