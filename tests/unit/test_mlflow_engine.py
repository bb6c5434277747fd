"""What MLflow loads an engine with: needs nothing but numpy, and takes what MLflow gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anneal_client.mlflow import anneal_engine_pyfunc as loader
from tests.factories.serving import bundle

TWO = """
def load(threads=None):
    return ["a", "b"], lambda feeds: {"sum": feeds["a"] + feeds["b"]}
"""


class Table:
    """As much of a `pandas.DataFrame` as is used."""

    def __init__(self, **columns: list[object]) -> None:
        self.columns = list(columns)
        self._of = columns

    def __getitem__(self, name: str) -> list[object]:
        return self._of[name]

    def to_numpy(self) -> np.ndarray:
        return np.array(list(self._of.values())).T


def test_an_engine_takes_what_mlflow_gives(tmp_path: Path) -> None:
    engine = loader._load_pyfunc(str(bundle(tmp_path)))
    rows = np.arange(6).reshape(2, 3)
    for given in (rows, {"x": rows}, {"x": rows, "other": rows}, Table(x=[rows[0], rows[1]])):
        np.testing.assert_array_equal(engine.predict(given)["y"], 2 * rows + 1)
    np.testing.assert_array_equal(engine.predict(Table(c1=[0, 3], c2=[1, 4], c3=[2, 5]))["y"], 2 * rows + 1)
    assert engine({"x": rows})["width"].tolist() == [3, 3]


def test_engines_side_by_side_keep_apart(tmp_path: Path) -> None:
    one, two = loader.Engine(bundle(tmp_path / "1")), loader.Engine(bundle(tmp_path / "2", TWO))
    ones = np.ones(2, np.int64)
    assert two({"a": ones, "b": ones})["sum"].tolist() == [2, 2]
    assert one.inputs == ["x"]
    with pytest.raises(ValueError, match="missing inputs: b; the engine takes a, b"):
        two.predict({"a": ones})
    with pytest.raises(ValueError, match="several inputs"):
        two.predict(ones)
    with pytest.raises(FileNotFoundError, match="not an unpacked bundle"):
        loader.Engine(tmp_path)


def test_the_loader_needs_nothing_of_the_client(tmp_path: Path) -> None:
    bundle(tmp_path / "bundle")
    script = f"""
import sys
sys.path.insert(0, {str(Path(loader.__file__).parent)!r})
import anneal_engine_pyfunc, numpy
print(anneal_engine_pyfunc._load_pyfunc({str(tmp_path / "bundle")!r}).predict(numpy.array([[1]]))["y"])
print(sorted(name for name in sys.modules if name.split(".")[0] in ("anneal_client", "mlflow", "httpx", "pandas")))
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[[3]]", "[]"]
