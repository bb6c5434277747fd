"""A `.pt2` source (torch.export): to ONNX by the dynamo exporter, and compared with it afterwards."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.graph import learned_ranges
from workers.graph.exported_program import load_program, message_of, quiet, tensor_inputs
from workers.graph.onnx_files import INLINE_LIMIT_BYTES, MODEL_FILE, read_skeleton
from workers.stages.export._first_inference import Exported
from workers.stages.export._names import name_inputs, rename_symbol
from workers.stages.export._pt2_guard import clean_copy
from workers.stages.export._trial import TrialInputs, batch_sizes, compare, open_session
from workers.stages.export._write import write_model

if TYPE_CHECKING:
    from workers.kernel import Arrays

_ATTEMPTS = 3  # inputs at each batch size


def _require_torch() -> None:
    try:
        with quiet():
            import onnxscript  # noqa: F401  (torch.onnx needs it; better to miss it here than in the middle)
            import torch  # noqa: F401
    except ImportError as error:
        raise StageFailure(
            "missing_extra",
            f"This worker cannot read .pt2 files: {error.name or 'torch'} is not installed.",
            FailureKind.REQUEST,
            remedy="Upload ONNX, or ask the operator to install the extra `torch` (pip install 'anneal[torch]').",
            cacheable=False,
        ) from None


class Program:
    """A loaded `ExportedProgram`."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.notes: list[str] = []

    @classmethod
    def load(cls, path: Path, workspace: Path) -> Program:
        """Load from a cleaned copy. Raises StageFailure `missing_extra`, `unsafe_program`, `invalid_model`."""
        _require_torch()
        copy = workspace / "program.pt2"
        clean_copy(path, copy, cls._saved(((), {})))
        try:
            program = load_program(copy)
        finally:
            copy.unlink(missing_ok=True)
        return cls(program)

    @staticmethod
    def _saved(value: Any) -> bytes:
        import torch

        content = io.BytesIO()
        torch.save(value, content)
        return content.getvalue()

    def keep(self, source: Path, target: Path) -> None:
        """Write the cleaned program to `target`, with sample inputs of ones: `torch.export.load` needs nothing more."""
        clean_copy(source, target, self._saved(self._program.example_inputs))

    def to_onnx(self, folder: Path, opset: int) -> Path:
        """Write the ONNX model to `folder`; its dynamic first axis is named `batch`. Raises `export_failed`."""
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MODEL_FILE
        tensors = [*self._program.state_dict.values(), *self._program.constants.values()]
        size = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        try:
            with quiet():
                converted = torch.onnx.export(self._program, dynamo=True, opset_version=opset, verbose=False)
                assert converted is not None
                converted.save(str(path), external_data=size > INLINE_LIMIT_BYTES // 2)
        except Exception as error:  # the exporter's own errors, and whatever a pass of it trips over
            text = message_of(error, deepest=True)
            op = re.search(r"op='([\w.]+)'|\b(aten\.\w+)", text)
            raise model_failure(
                "export_failed",
                f"The program cannot be converted to ONNX: {text}",
                node=(op.group(1) or op.group(2)) if op else None,
                remedy="Convert it to ONNX yourself, or replace the operation that has no ONNX counterpart.",
            ) from None
        model = read_skeleton(path)
        names = {info.name for info in model.graph.input}
        self.notes += name_inputs(model, tensor_inputs(self._program))
        if names != {info.name for info in model.graph.input}:
            write_model(model, folder)
        first: Any = next(
            (i.type.tensor_type.shape.dim[:1] for i in model.graph.input if i.type.tensor_type.shape.dim), []
        )
        known = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim}
        if first and first[0].dim_param and "batch" not in known:
            rename_symbol(model, first[0].dim_param, "batch")
            write_model(model, folder)
        elif first and not first[0].dim_param:
            self.notes.append(
                "The program was exported with a fixed batch; for a dynamic one use "
                "torch.export.export(..., dynamic_shapes={...: {0: torch.export.Dim('batch')}})."
            )
        return path

    def check(self, exported: Exported, trial: TrialInputs, shapes: Mapping[str, Any] | None) -> dict[str, Any]:
        """Source against ONNX on several inputs and, where it is dynamic, two batch sizes.

        Returns `{"inputs", "batch_sizes", "max_abs_diff"}`; raises `export_mismatch` with the tensor and the error.
        """
        session = open_session(exported.folder)
        sizes, worst, compared = [], 0.0, 0
        refused: Exception | None = None
        for batch in batch_sizes(exported.inputs, shapes):
            for attempt in range(_ATTEMPTS):
                feeds = trial.at(session.inputs, batch, attempt)
                try:
                    wanted = self._run(feeds, [o.name for o in session.outputs])
                except StageFailure:
                    raise
                except Exception as error:  # e.g. a batch below the range that the program was exported for
                    refused = error
                    break
                found = compare(wanted, session.run(feeds))
                if found.significant:
                    raise _mismatch(found.tensor, found.error, batch)
                worst, compared = max(worst, found.error), compared + 1
            else:
                sizes.append(batch)
        session.close()
        if not compared:
            raise model_failure(
                "export_failed",
                f"The program does not run on inputs of its own shapes: {message_of(refused)}",
                remedy="Give `shapes` inside the ranges that the program was exported for.",
            )
        if refused is not None:
            self.notes.append(f"Source and ONNX were compared at batch {sizes} only: {message_of(refused)[:160]}")
        return {"passed": True, "inputs": compared, "batch_sizes": sizes, "max_abs_diff": worst}

    def resolved(self, learned: str, exported: Exported, trial: TrialInputs) -> str:
        """Learned ranges with the names that their values have in the ONNX graph."""
        import torch

        wanted, found = set(learned_ranges.values_of(learned)), {}

        class Looker(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                result = super().run_node(n)
                if n.name in wanted:
                    found[n.name] = result.numpy()
                return result

        feeds = trial.at(exported.inputs, batch_sizes(exported.inputs, None)[-1], 0)
        with quiet(), torch.no_grad():
            Looker(self._program.module()).run(*self._flat(feeds), enable_io_processing=False)
        return learned_ranges.resolved(learned, found, exported.folder / MODEL_FILE, feeds)

    def _flat(self, feeds: Arrays) -> list[Any]:
        import torch

        names = self._program.graph_signature.user_inputs
        return [torch.from_numpy(np.array(feeds[n])) if isinstance(n, str) and n in feeds else n for n in names]

    def _run(self, feeds: Arrays, names: list[str]) -> Arrays:
        import torch
        from torch.utils import _pytree as pytree

        with quiet(), torch.no_grad():
            args, kwargs = pytree.tree_unflatten(self._flat(feeds), self._program.call_spec.in_spec)
            result = self._program.module()(*args, **kwargs)
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if len(leaves) != len(names):
            raise model_failure("export_mismatch", f"The program has {len(leaves)} outputs, the ONNX has {len(names)}.")
        return {name: leaf.detach().numpy() for name, leaf in zip(names, leaves, strict=True)}


def _mismatch(tensor: str, error: float, batch: int) -> StageFailure:
    return model_failure(
        "export_mismatch",
        f"Output {tensor!r} of the ONNX model differs from the source program's by {error:.3g} at batch {batch}.",
        tensor=tensor,
        remedy="Call model.eval() before torch.export.export, or convert the model to ONNX yourself.",
    )
