"""The batch size that the compiler has in mind where it is dynamic.

Inductor lays out its kernels (how much one block computes) for the sizes that a program was traced with, and times the
choices at them: two samples, as exporters are called. What is best there need not be best at the sizes that a job is
about, so that these are told instead. Code for one size runs at all others still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import GraphModule


def expect_batch(graph: GraphModule, axes: Mapping[str, int | None], size: int) -> int:
    """Have the compiler choose for batches of `size`. `axes`: of inputs by name, which of theirs is the batch. How many
    inputs' were changed: none where it is fixed, or where this torch keeps its sizes elsewhere."""
    import torch

    changed = 0
    for node in graph.graph.find_nodes(op="placeholder"):
        axis, value = axes.get(str(node.target)), node.meta.get("val")
        if axis is None or not isinstance(value, torch.Tensor) or axis >= value.dim():
            continue
        extent = value.shape[axis]
        if not isinstance(extent, torch.SymInt):
            continue
        known = getattr(extent.node.shape_env, "backed_var_to_val", None)  # `var_to_val` up to torch 2.10
        if known is None:
            known = getattr(extent.node.shape_env, "var_to_val", None)
        if known is not None and extent.node.expr in known:  # not where it is an expression of others
            known[extent.node.expr] += size - int(known[extent.node.expr])  # a number of sympy's still
            changed += 1
    return changed
