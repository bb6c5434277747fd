"""How large the inputs of an exported program's matrix products get: the calibration of static fp8 scales."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workers.graph.exported_program import ProgramFolder

RANGES_FILE = "ranges.json"
_FORMAT = 1


def observed(source: ProgramFolder, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The largest magnitude of each `linear`'s input over `batches` (arrays by name), by the node's name in the
    program's module; infinite where one was no number. Raises what torch raises."""
    import torch

    found: dict[str, float] = {}

    class Observer(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n.op == "call_function" and n.target is torch.ops.aten.linear.default:
                x = self.fetch_args_kwargs_from_env(n)[0][0]
                most = float(x.abs().max()) if x.numel() else 0.0
                found[n.name] = max(found.get(n.name, 0.0), most if math.isfinite(most) else math.inf)
            return super().run_node(n)

    program = source.program
    observer = Observer(program.module())
    with torch.no_grad():
        for arrays in batches:
            given = {name: torch.from_numpy(arrays[name].copy()) for name in source.order}
            flat = [given.get(name, name) for name in program.graph_signature.user_inputs]
            observer.run(*flat, enable_io_processing=False)
    return found


def write(folder: Path, found: Mapping[str, float]) -> None:
    (folder / RANGES_FILE).write_text(json.dumps({"format": _FORMAT, "linear": dict(found)}, indent=1, sort_keys=True))


def read(folder: Path) -> dict[str, float] | None:
    """None where the program was not calibrated."""
    path = folder / RANGES_FILE
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    return {str(name): float(value) for name, value in document["linear"].items()}
