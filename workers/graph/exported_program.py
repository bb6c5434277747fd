"""`program.pt2` (torch.export): loading it, where nothing in it can run code any more, and what it says of itself."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain.failures import model_failure
from workers.artifacts import PROGRAM_FILE
from workers.graph.interface import Interface
from workers.measure.axes import batch_axes


@contextmanager
def quiet() -> Iterator[None]:
    """Torch warns of its own deprecations and of libraries it could use; none of it is about the user's model. Within,
    `torch.load` never unpickles objects (the archive was cleaned before: this is the second lock on the door)."""
    name, force = "torch.onnx", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    level, before = logging.getLogger(name).level, os.environ.get(force)
    logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[force] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger(name).setLevel(level)
        if before is None:
            del os.environ[force]
        else:
            os.environ[force] = before


def load_program(path: Path) -> Any:
    """The `ExportedProgram` of a cleaned archive, with example inputs. Raises StageFailure `invalid_model`."""
    with quiet():
        import torch
        import torch.export
    try:
        with quiet():
            program = torch.export.load(str(path))
            program.example_inputs = _example_inputs(torch, program)
    except Exception as error:  # damaged content shows as any kind of error
        raise model_failure(
            "invalid_model",
            f"torch cannot load the program: {message_of(error)}",
            remedy=f"Save it again with torch.export.save and a torch version up to this worker's {torch.__version__}.",
        ) from None
    return program


def message_of(error: BaseException | None, *, deepest: bool = False) -> str:
    """The error's message in one line without paths; `deepest`: that of the error which caused it all."""
    while deepest and error is not None and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\S*/(?:[\w.+-]+/)+", "", " ".join(str(error).split()))
    return (text or type(error).__name__)[:400]


@dataclass(frozen=True)
class ProgramFolder:
    """An artifact of kind exported-program. `ranges`: of each input in `order`, by axis, the least and the largest size
    that the program was exported for; None where nothing bounds it. `order`: the tensors that it takes, by position."""

    program: Any
    interface: Interface
    order: tuple[str, ...]
    ranges: Mapping[str, list[list[int | None]]]

    @classmethod
    def read(cls, folder: Path) -> ProgramFolder:
        """Raises StageFailure: `load_failed`, `invalid_model`."""
        interface = Interface.read(folder)
        program = load_program(folder / PROGRAM_FILE)
        user, values = tensor_inputs(program), _placeholders(program)
        known = {spec.name for spec in interface.inputs}
        if known != set(user):
            raise model_failure(
                "unsupported_io",
                f"The program takes {', '.join(user)}, its ONNX model {', '.join(sorted(known))}.",
                remedy="Use another backend for this model.",
            )
        ranges = {name: [_range(program, size) for size in values[name].shape] for name in user}
        return cls(program, interface, tuple(user), ranges)

    def batch_sizes(self, most: int) -> tuple[int, int]:
        """The least batch that the program takes, and the largest up to `most`, or that least one."""
        axes = batch_axes(self.interface.inputs)
        ranges = [self.ranges[name][axis] for name, axis in axes.items() if axis is not None]
        least = max((low or 1 for low, _ in ranges), default=1)
        held = min((high for _, high in ranges if high is not None), default=most)
        return least, max(least, min(held, most))


def tensor_inputs(program: Any) -> list[str]:
    """The names of the tensors that a loaded program takes, by position."""
    import torch

    values = _placeholders(program)
    return [n for n in program.graph_signature.user_inputs if isinstance(values.get(n), torch.Tensor)]


def _placeholders(program: Any) -> dict[str, Any]:
    return {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}


def _range(program: Any, size: Any) -> list[int | None]:
    if isinstance(size, int):
        return [size, size]
    found = program.range_constraints.get(size.node.expr)
    if found is None:
        return [None, None]
    return [int(bound) if bound.is_integer and bound.is_finite else None for bound in (found.lower, found.upper)]


def _example_inputs(torch: Any, program: Any) -> Any:
    """Arguments as the exporter's passes need them, in place of the archive's own, which are pickles: ones, of the
    sizes that the program was traced with."""
    from torch.utils import _pytree as pytree

    values = _placeholders(program)
    flat = []
    for name in program.graph_signature.user_inputs:
        value = values.get(name) if isinstance(name, str) else name
        if isinstance(value, torch.Tensor):
            sizes = [d if isinstance(d, int) else d.node.hint or 2 for d in value.shape]
            value = torch.ones(sizes, dtype=value.dtype)
        flat.append(value)
    return pytree.tree_unflatten(flat, program.call_spec.in_spec)
