"""`interface.json`: the inputs and outputs of a model under their ONNX names, types and symbolic shapes, by position,
for engines whose own files do not hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain.failures import StageFailure
from workers.kernel import TensorSpec

INTERFACE_FILE = "interface.json"
_FORMAT = 1


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs in the model's order, as ONNX Runtime shows them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def write(self, folder: Path) -> None:
        document = {"format": _FORMAT, "inputs": _to_json(self.inputs), "outputs": _to_json(self.outputs)}
        (folder / INTERFACE_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Interface:
        """Raises StageFailure (`load_failed`)."""
        try:
            document = json.loads((folder / INTERFACE_FILE).read_bytes())
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']}")
            return cls(_from_json(document["inputs"]), _from_json(document["outputs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StageFailure(
                "load_failed",
                f"The engine's {INTERFACE_FILE} is missing or damaged ({type(error).__name__}).",
                remedy="Build the engine again.",
            ) from error


def _to_json(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} | ({"values": [*s.values]} if s.values else {})
        for s in specs
    ]


def _from_json(entries: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(e["name"]), str(e["dtype"]), tuple(e["shape"]), tuple(e["values"]) if e.get("values") else None)
        for e in entries
    )
