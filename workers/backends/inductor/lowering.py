"""What is done to an exported program's graph before Inductor compiles it: batch norms folded into convolutions,
products computed in fewer bits (`narrowing`, `fp8`), and for a GPU what it computes faster otherwise (`rewriting`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app.domain.failures import StageFailure, model_failure
from workers.backends.inductor.fp8 import quantize
from workers.backends.inductor.narrowing import lower
from workers.backends.inductor.nodes import cleaned, is_node, keep, op_of, tensor_of
from workers.backends.inductor.rewriting import rewrite

if TYPE_CHECKING:
    from torch.fx import GraphModule

_TEXT = re.compile(r"[\w ,.>:/-]{0,1000}", re.ASCII)


def lowered(
    torch: Any, program: Any, precision: str, device: str, magnitudes: Mapping[str, float] | None = None
) -> tuple[GraphModule, dict[str, int]]:
    """The graph of an exported program as it is to be compiled, on `device`, and how many batch norms were folded,
    products are in float8, convolutions became products and GELUs were rewritten. `magnitudes`: of the products'
    inputs, where they were calibrated for float8. Raises StageFailure(`nothing_to_convert`, `precision_unsupported`),
    and what torch raises."""
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, "cuda")
    graph = program.module()
    if hasattr(graph, "_guards_fn"):  # sizes are checked by the session
        for node in graph.graph.find_nodes(op="call_module", target="_guards_fn"):
            graph.graph.erase_node(node)
        delattr(graph, "_guards_fn")
    for node in list(graph.graph.nodes):  # what the trace knew of types and devices: "cuda" is not "cuda:0"
        if op_of(node) == "_assert_tensor_metadata":
            graph.graph.erase_node(node)
    cleaned(graph)
    check_texts(graph)
    told = {"batch_norm": fold_batch_norms(graph)}
    to = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    if to is not None and not lower(graph, to, whole=device == "cuda"):
        raise _nothing("product or convolution", "fp32")
    if magnitudes:
        if to is None:
            raise model_failure("precision_unsupported", "Products in float8 give float16 or bfloat16, not float32.")
        told["fp8_product"] = quantize(graph, magnitudes, to)
        if not told["fp8_product"]:
            raise _nothing("matrix product of sizes that are multiples of 16", "fp16")
    if to is not None and device == "cuda":
        told |= rewrite(graph)
    return graph, {what: count for what, count in told.items() if count}


def _nothing(what: str, instead: str) -> StageFailure:
    return model_failure(
        "nothing_to_convert", f"The program has no float32 {what}.", remedy=f"Use {instead} for this model."
    )


def check_texts(graph: GraphModule) -> None:
    """Texts among the arguments (a rounding mode, an equation) are pasted into the source that is compiled: refuse
    what could be more than that. Raises StageFailure(`unsafe_program`)."""
    from torch.utils import _pytree as pytree

    for node in graph.graph.nodes:
        if node.op == "call_function":
            texts = (a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, str))
            odd = next((text for text in texts if not _TEXT.fullmatch(text)), None)
            if odd is not None:
                raise model_failure(
                    "unsafe_program",
                    f"Node {node.name!r} has the text {odd[:60]!r} among its arguments, which is not compiled.",
                    node=node.name,
                    remedy="Export a model of plain tensors and standard ATen operators.",
                )


def fold_batch_norms(graph: GraphModule) -> int:
    """Fold each batch norm (in inference) that alone reads a convolution into that convolution's weights; how many were
    folded. The same arithmetic but for rounding."""
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    folded = 0
    for node in list(graph.graph.nodes):
        conv: Any = node.args[0] if op_of(node) == "batch_norm" and node.args else None
        if not is_node(conv) or not op_of(conv).startswith("conv") or "transpose" in op_of(conv) or len(conv.users) > 1:
            continue
        x, weight, bias, *rest = [*conv.args, None, None][: max(len(conv.args), 3)]
        _, gamma, beta, mean, variance, training, _momentum, eps, *_ = node.args
        stored = (weight, bias, gamma, beta, mean, variance)
        tensors = [tensor_of(graph, n) for n in stored]
        missing = any(t is None and n is not None for t, n in zip(tensors, stored, strict=True))
        if training or missing or conv.kwargs or any(tensors[i] is None for i in (0, 4, 5)):
            continue
        w, b, g, s, m, v = tensors
        fused = fuse_conv_bn_weights(w, b, m, v, eps, g, s)
        places = []
        with graph.graph.inserting_before(conv):
            for part, value in zip(("weight", "bias"), fused, strict=True):
                places.append(keep(graph, f"_folded_{folded}_{part}", value))
        conv.args = (x, *places, *rest)
        node.replace_all_uses_with(conv)
        graph.graph.erase_node(node)
        folded += 1
    cleaned(graph)
    return folded
