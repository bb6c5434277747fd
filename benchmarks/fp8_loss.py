"""What static float8 products cost in accuracy, on trained weights, computed on a CPU.

    python benchmarks/fp8_loss.py --models vit,minilm

The models are those of `make_models.py`, which trains ViT for minutes on first use; their modules get the weights that
lie in the ONNX file.

The program is calibrated and its products are put into float8 as a job does it for a GPU (`workers/backends/inductor`).
Where the GPU multiplies float8, the rounded values are multiplied in float32 here, as it sums them in more bits than it
multiplies. Other products are rounded to float16; what lies between products stays in float32, where a GPU's graph has
float16, and GELU is exact. So the loss is what the rounding to float8 costs, and not all that a GPU's engine may lose.
Loss: points of top-1 against labels, or 100 × (1 − cosine) of embeddings.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from _common import CannotMeasure, execute, parser, say, table
from make_models import LARGEST_BATCH, named
from torch import nn
from zoo import language, vision

from workers.backends.inductor.lowering import lowered
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder
from workers.graph.interface import Interface

Json = dict[str, Any]
Arrays = dict[str, np.ndarray[Any, Any]]
MODULES: dict[str, Callable[[], nn.Module]] = {"vit": vision.ViT, "minilm": language.SentenceEncoder}
GOAL = 0.5  # percent
_SAME = 1e-3  # of the largest output: what a module may differ by from its ONNX file
_AT_ONCE = 8
_HALVES = (torch.float16, torch.bfloat16)
aten = torch.ops.aten
_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.conv2d.default,
    aten.scaled_dot_product_attention.default,
)


class Emulated(torch.fx.Interpreter):
    """A lowered graph on a CPU that may have no products of few bits."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten._scaled_mm.default:
            rows, columns, of_rows, of_columns, bias, _, to = args[:7]
            found = (rows.float() @ columns.float()) * (of_rows * of_columns)
            return (found if bias is None else found + bias.float()).to(to)
        halves = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype in _HALVES]
        if target in _PRODUCTS and halves:
            wide = tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALVES else a for a in args)
            return super().call_function(target, wide, kwargs).to(halves[0])
        return super().call_function(target, args, kwargs)


def with_weights(module: nn.Module, path: Path) -> nn.Module:
    """The module with the weights of its ONNX form, in which those of a product with a bias bear no name."""
    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    found = {name: stored[name] for name in module.state_dict() if name in stored}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product = next((made[n] for n in node.input if n in made and made[n].op_type == "MatMul"), None)
        if node.op_type == "Add" and bias is not None and product is not None:
            found[f"{bias.removesuffix('.bias')}.weight"] = stored[product.input[1]].T
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in found.items()})
    return module.eval()


def exported(module: nn.Module, example: Arrays) -> ProgramFolder:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        given = tuple(torch.from_numpy(a[:2]) for a in example.values())
        program = torch.export.export(module, given, dynamic_shapes=tuple({0: batch} for _ in given))
    return ProgramFolder(program, Interface((), ()), tuple(example), {})


def check(original: np.ndarray[Any, Any], path: Path, samples: Arrays) -> None:
    """Raises CannotMeasure where the module is not the file's."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = np.asarray(session.run(None, next(pieces(samples)))[0])
    off = float(np.abs(original[: len(wanted)] - wanted).max() / np.abs(wanted).max())
    if off > _SAME:
        raise CannotMeasure(f"the module is off by {off:.3g} from its ONNX file")


def pieces(arrays: Arrays) -> Iterator[Arrays]:
    count = len(next(iter(arrays.values())))
    for start in range(0, count - count % _AT_ONCE, _AT_ONCE):
        yield {name: a[start : start + _AT_ONCE] for name, a in arrays.items()}


def answers(run: Any, arrays: Arrays) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = [run(*(torch.from_numpy(a.copy()) for a in piece.values())) for piece in pieces(arrays)]
    return np.concatenate([(f[0] if isinstance(f, tuple | list) else f).float().numpy() for f in found])


def loss_of(original: np.ndarray[Any, Any], other: np.ndarray[Any, Any], labels: np.ndarray[Any, Any] | None) -> Json:
    if labels is None:
        along = (original * other).sum(1) / (np.linalg.norm(original, axis=1) * np.linalg.norm(other, axis=1))
        return {"loss": 100 * (1 - float(along.mean())), "what": "cosine"}
    right = [(a.argmax(1) == labels[: len(a)]).mean() for a in (original, other)]
    same = float((original.argmax(1) == other.argmax(1)).mean())
    return {"loss": 100 * float(right[0] - right[1]), "what": f"top-1 of {100 * right[0]:.1f} %", "agreement": same}


def measure(arguments: argparse.Namespace) -> Json:
    rows, figures = [], {}
    for name, files in named(arguments.models):
        if name not in MODULES:
            raise CannotMeasure(f"{name} has no module here; there are {', '.join(MODULES)}")
        calibration, validation = (dict(np.load(path)) for path in (files.calibration, files.validation))
        labels = validation.pop("labels", None)
        source = exported(with_weights(MODULES[name](), files.model), calibration)
        ranges = program_ranges.observed(source, pieces(calibration))
        original = answers(source.program.module(), validation)
        check(original, files.model, validation)
        found: Json = {}
        for precision, magnitudes in (("fp16", None), ("fp8", ranges)):
            graph, told = lowered(torch, source.program, "fp16", "cpu", magnitudes)
            other = answers(Emulated(graph).run, validation)
            found[precision] = {**loss_of(original, other, labels), "products": told.get("fp8_product", 0)}
            say(f"{files.label}: {precision}: {found[precision]}")
        fp8 = found["fp8"]
        cells = [files.label, files.weights, str(fp8["products"]), str(len(original)), fp8["what"]]
        cells += [f"{found[p]['loss']:.3f}" for p in ("fp16", "fp8")]
        rows.append([*cells, "met" if fp8["loss"] <= GOAL else "**missed**"])
        figures[name] = found
    head = ["model", "weights", "products in fp8", "samples", "judged by", "fp16, loss %", "fp8, loss %"]
    print(table([*head, f"≤ {GOAL} %"], rows))
    return {"models": figures}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="vit,minilm", help=f"some of {','.join(MODULES)}")
    execute(measure, options.parse_args())
