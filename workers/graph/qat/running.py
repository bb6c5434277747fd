"""Programs on batches of samples. Needs torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from app.domain.failures import StageFailure
from workers.data import Batch
from workers.graph.exported_program import ProgramFolder, message_of
from workers.graph.qat import batches
from workers.graph.qat.placement import not_trainable

_ELSE = "cpu"


class Runner:
    """Runs modules of one program. Fewer samples than it takes at least are repeated."""

    def __init__(self, source: ProgramFolder, device: str) -> None:
        self.source = source
        known = torch.get_device_module(device).is_available()  # of a GPU, where torch was built for it
        self.device = torch.device(device if known else _ELSE)
        self._least, _ = source.batch_sizes(1)

    def module(self) -> Any:
        """A graph module with weights of its own, on the device."""
        module = copy.deepcopy(self.source.program.module()).to(self.device)
        return module if self.device.type == _ELSE else _moved(module, self.device)

    def answers(self, module: nn.Module, batch: Batch) -> list[Tensor]:
        """The outputs by position, as the interface has them. Raises StageFailure `not_trainable`."""
        args, kwargs = pytree.tree_unflatten(self._flat(batch), self.source.program.call_spec.in_spec)
        try:
            result = module(*args, **kwargs)
        except (StageFailure, MemoryError):
            raise
        except Exception as error:  # whatever an operator says
            raise not_trainable(f"it does not run on the training data: {message_of(error)}", None) from error
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def interpreted(self, interpreter: torch.fx.Interpreter, batch: Batch) -> None:
        """The same, node by node."""
        interpreter.run(*self._flat(batch), enable_io_processing=False)

    def labels(self, batch: Batch) -> np.ndarray[Any, Any] | None:
        """One for each row that the program is given."""
        found = batches.labels_of(batch)
        return found if found is None else found[np.arange(max(len(batch), self._least)) % len(batch)]

    def end_of_gradients(self, module: Any, batch: Batch) -> str | None:
        """The first node that reads what has a gradient and gives floating-point numbers without one."""
        found: list[str] = []

        class Looker(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                result = super().run_node(n)
                read = [self.env[i] for i in n.all_input_nodes if i in self.env]
                gradual = any(isinstance(v, Tensor) and v.requires_grad for v in read)
                ends = isinstance(result, Tensor) and result.is_floating_point() and not result.requires_grad
                if n.op == "call_function" and gradual and ends:
                    found.append(n.name)
                return result

        self.interpreted(Looker(module, garbage_collect_values=False), batch)
        return found[0] if found else None

    def _flat(self, batch: Batch) -> list[Any]:
        arrays = batch.feeds if len(batch) >= self._least else batch.filled(self._least)
        given = {n: torch.from_numpy(arrays[n].copy()).to(self.device) for n in self.source.order}
        return [given.get(name, name) for name in self.source.program.graph_signature.user_inputs]


def _moved(module: Any, device: torch.device) -> Any:
    """What the program makes anew (positions, masks) made on `device`, too, and nothing asked of where tensors lie."""
    for node in list(module.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            module.graph.erase_node(node)
        elif isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
    return module


def not_gradual(runner: Runner, module: Any, batch: Batch, error: Exception) -> StageFailure:
    """What autograd says, with the node: by the operator that it names, or where gradients end."""
    text = message_of(error)
    nodes: Sequence[Any] = [n for n in module.graph.nodes if n.op == "call_function"]
    named = next((n.name for n in nodes if _is_named(text, str(n.target))), None)
    if named is None and "grad" in text:
        named = runner.end_of_gradients(module, batch)
    return not_trainable(text, named)


def _is_named(text: str, target: str) -> bool:
    parts = target.split(".")
    return len(parts) > 1 and (f"'{parts[1]}'" in text or f"aten::{parts[1]}" in text)
