"""What a training does before its first step: like channels, ranges, and the number of threads. With the real torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.factories import programs
from tests.unit import test_training
from tests.unit.test_training import BATCH, SCORES, SMALL, TEXT, one_thread
from workers.graph.exported_program import ProgramFolder

pytestmark = test_training.pytestmark

__all__ = ["one_thread"]  # a fixture


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    programs.folder(programs.brittle(), folder / "model", SMALL, SCORES, BATCH)
    test_training._sets(folder)
    return folder


def test_a_range_learns_to_leave_out_what_is_rare() -> None:
    """One value of a hundred times the size of the others: rounding them finely is worth cutting it. A bound holds."""
    import torch

    from workers.graph.qat.rounding import RoundedActivation

    x = torch.cat([torch.linspace(0.0, 1.0, 4000), torch.tensor([100.0])])
    for bounded, start in ((False, 100.0), (True, 0.5)):
        rounded = test_training._settled(RoundedActivation("uint8", bounded=bounded), torch.tensor([0.0, start]))
        learner = torch.optim.Adam([rounded.log_scale], lr=0.1)
        for _ in range(150):
            learner.zero_grad()
            (rounded(x) - x)[:-1].square().sum().backward()
            learner.step()
            rounded.keep_bound()
        low, high = rounded.limits()
        assert low == 0.0
        assert high == pytest.approx(start) if bounded else 0.9 < high < 10.0


def test_channels_are_brought_to_like_size_and_nothing_else_changes(tmp_path: Path) -> None:
    import torch

    from workers.graph.qat import channels

    for name, net, inputs, outputs in (
        ("cnn", programs.separable(), SMALL, SCORES),
        ("transformer", programs.transformer(), TEXT, {"y": ("float32", ("batch", 4)), "m": TEXT["mask"]}),
    ):
        programs.folder(net, tmp_path / name, inputs, outputs, {"batch": (1, 64), "time": (2, 32)})
        module = ProgramFolder.read(tmp_path / name).program.module()
        groups = channels.groups_of(module)
        feeds = (
            [torch.randn(4, 1, 8, 8)]
            if name == "cnn"
            else [torch.randint(0, 50, (3, 5)), torch.ones(3, 5, dtype=torch.int64)]
        )
        with torch.no_grad():
            before = channels.Sizes(module, groups)
            wanted = before.run(*feeds, enable_io_processing=False)[0]
            assert channels.equalize(module, groups, before.found) > 0
            after = channels.Sizes(module, groups)
            made = after.run(*feeds, enable_io_processing=False)[0]
        assert torch.allclose(made, wanted, rtol=1e-3, atol=1e-4)
        if name == "cnn":
            (deep,) = [g.values[-1][0] for g in groups if g.read[0][1] > 1]
            assert _spread(before.found[deep]) > 20
            assert _spread(after.found[deep]) < 1.01
            (sums,) = [g for g in groups if len(g.written) > 2 and len(g.values) > 3]
            assert {node.name.rstrip("_0123456789") for node, _ in sums.values} == {"batch_norm", "relu", "add", "mean"}
            assert [len(sums.written), len(sums.read)] == [4, 2], "two batch norms; the next convolution and the head"


def _spread(sizes: Any) -> float:
    used = sizes[sizes > 0]
    return float(used.max() / used.min())


@pytest.mark.parametrize(("times", "chosen"), [({1: 0.06, 2: 1.5}, 1), ({1: 1.0, 2: 0.9}, 1), ({1: 1.0, 2: 0.55}, 2)])
def test_threads_are_those_with_which_a_step_is_faster(
    times: dict[int, float], chosen: int, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from workers.graph.qat.training import Training

    torch.set_num_threads(2)
    monkeypatch.setattr(Training, "_probe", lambda _, count: [times[torch.get_num_threads()]] * count)
    result = test_training._call(job, job / "model", epochs=1, seconds=1e4, round=1, rounds=3)
    assert result.data["training"]["threads"] == chosen
    torch.set_num_threads(1)
    test_training._call(job, job / "out" / "model", "second", epochs=1, seconds=1e4, round=2, rounds=3)
    assert torch.get_num_threads() == chosen, "it goes on as it began"
