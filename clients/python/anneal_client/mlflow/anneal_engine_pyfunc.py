"""What MLflow loads an engine with. A copy of this file lies in every model that `anneal_client.mlflow` saves, so that
whoever loads the model needs MLflow, numpy and the engine's own library, and nothing of Anneal."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_loaded = itertools.count()


class Engine:
    """The engine of an unpacked bundle. `inputs`: the names of its inputs. Threads may share it."""

    def __init__(self, folder: str | Path) -> None:
        script = Path(folder) / "infer.py"
        # A name of its own, since a process may load several engines.
        spec = importlib.util.spec_from_file_location(f"anneal_infer_{next(_loaded)}", script)
        if spec is None or spec.loader is None or not script.is_file():
            raise FileNotFoundError(f"{script}: not an unpacked bundle of Anneal")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names, run = module.load()
        self.inputs: list[str] = list(names)
        self._run: Callable[[Mapping[str, Any]], Mapping[str, Any]] = run

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by the names of the inputs, in the engine's own types and shapes; answers all outputs by name."""
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise ValueError(f"missing inputs: {', '.join(missing)}; the engine takes {', '.join(self.inputs)}")
        return dict(self._run({name: feeds[name] for name in self.inputs}))

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> dict[str, Any]:  # noqa: ARG002
        """MLflow's call, with MLflow's signature. `model_input`: a mapping of arrays by input, an array where there is
        one input, or a table with a column for each input, whose cells are its samples."""
        return self(self._feeds(model_input))

    def _feeds(self, model_input: Any) -> Mapping[str, Any]:
        if isinstance(model_input, Mapping):
            return model_input
        import numpy as np

        if hasattr(model_input, "columns"):  # a pandas.DataFrame, without importing pandas
            if len(self.inputs) == 1 and self.inputs[0] not in model_input.columns:
                return {self.inputs[0]: model_input.to_numpy()}
            return {name: np.stack(list(model_input[name])) for name in self.inputs if name in model_input.columns}
        if len(self.inputs) > 1:
            raise ValueError(f"the engine has several inputs: give a dict of arrays by name: {', '.join(self.inputs)}")
        return {self.inputs[0]: np.asarray(model_input)}


def _load_pyfunc(path: str) -> Engine:
    """MLflow's entry point: `path` is the unpacked bundle."""
    return Engine(path)
