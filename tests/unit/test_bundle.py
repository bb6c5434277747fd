"""The bundle that a user unpacks: what its `infer.py` does is what was timed, and it tells whether the engine
answers here as it did there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import onnx_models as models
from workers.kernel import Reporter, backends

CPU_BACKENDS = ("onnxruntime", "openvino")


class Notes(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


def loaded(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The `run` of the bundle's `infer.py`."""
    spec = importlib.util.spec_from_file_location(f"infer_{folder.name}", folder / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _names, run = module.load()
    found: Callable[[dict[str, Any]], dict[str, Any]] = run
    return found


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_what_is_timed_is_what_the_loader_does(name: str, tmp_path: Path) -> None:
    """The same outputs by name, each in memory of its own, as a caller of `infer.py` gets them."""
    backend = backends()[name]()
    engine = tmp_path / "engine"
    engine.mkdir()
    built = backend.build(models.folder(models.mlp(), tmp_path / "model"), engine, {}, Notes())
    (engine / "infer.py").write_text(backend.infer_script(built["runtime"]))
    run, session = loaded(engine), backend.load(engine, built["runtime"])
    rng = np.random.default_rng(0)
    first, second = ({"input": rng.normal(size=(n, 8)).astype(np.float32)} for n in (2, 3))
    timed = session.call(first)()
    kept = {n: a.copy() for n, a in timed.items()}
    session.call(second)()
    for outputs in (run(first), timed):  # the next call wrote over nothing
        assert outputs.keys() == kept.keys()
        for output, array in outputs.items():
            np.testing.assert_array_equal(array, kept[output])
            assert array.flags.owndata or array.base is None or name == "onnxruntime"
    session.close()
