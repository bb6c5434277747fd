"""What a GPU computes faster otherwise, in a graph whose products are in float16 or bfloat16.

Functions take the places of operators: the compiler traces through them, and they see types and sizes as they come.

- A convolution whose windows do not overlap (the patches of a ViT, the stem of a ConvNeXt) is a matrix product of the
  windows: of ViT-B/16's 3.05 ms at batch 32 on an H200 its convolution took 0.23, and turning its layout 0.08.
- The exact GELU by an approximation of erf with an error of 1.5e-7, which is far below the type's own rounding: the
  library's erf takes so many instructions that it, and not the memory, is what the kernel waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workers.backends.inductor.nodes import cleaned, op_of, tensor_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

# Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26.
_P = 0.3275911
_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_DEFAULTS: tuple[Any, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)  # of the arguments of `conv2d`
_HALF_ROOT, _LOG2_E = 0.7071067811865476, 1.4426950408889634


def rewrite(graph: GraphModule) -> dict[str, int]:
    """Change the graph in place; how many of what."""
    told = {"patches": 0, "gelu": 0}
    for node in graph.graph.nodes:
        if op_of(node) == "gelu" and len(node.args) == 1 and not node.kwargs:
            node.target, what = gelu, "gelu"
        elif op_of(node) == "conv2d" and _windows(graph, node):
            node.target, what = product_of_windows, "patches"
        else:
            continue
        told[what] += 1
    cleaned(graph)
    return told


def _windows(graph: GraphModule, node: Any) -> bool:
    """Whether its windows lie side by side."""
    given = [*node.args, *_DEFAULTS[len(node.args) :]]
    weight, stride, padding, dilation, groups = given[1], *given[3:7]
    kernel = tensor_of(graph, weight)
    if kernel is None or node.kwargs or groups != 1 or isinstance(padding, str):
        return False
    plain = not any(padding) and all(d == 1 for d in dilation)
    sizes = list(kernel.shape[2:])
    return bool(plain and sizes == list(_pair(stride)) and max(sizes) > 1)


def _pair(value: Any) -> Sequence[int]:
    return [*value] * 2 if len(value) == 1 else value


def product_of_windows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    """`conv2d` where the stride is the kernel's size: [n, c, h, w] to [n, o, h / kh, w / kw], with channels last."""
    import torch

    (batch, channels, height, width), (outputs, _, kh, kw) = x.shape, weight.shape
    if not isinstance(height, int) or not isinstance(width, int) or height % kh or width % kw:
        made: Tensor = torch.nn.functional.conv2d(x, weight, bias, *rest)
        return made
    windows = x.reshape(batch, channels, height // kh, kh, width // kw, kw).permute(0, 2, 4, 1, 3, 5)
    rows = windows.reshape(batch, height // kh, width // kw, channels * kh * kw)
    product: Tensor = torch.nn.functional.linear(rows, weight.reshape(outputs, -1), bias)
    return product.permute(0, 3, 1, 2)


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), in float32 within. Of negative x the share is computed itself, not as a difference from one."""
    import torch

    if x.dtype not in (torch.float16, torch.bfloat16):
        exact: Tensor = torch.nn.functional.gelu(x)
        return exact
    wide = x.float()
    z = wide.abs() * _HALF_ROOT
    t = torch.reciprocal(1 + _P * z)
    share = torch.full_like(t, _A[-1])
    for factor in reversed(_A[:-1]):
        share = share * t + factor
    share = 0.5 * share * t * torch.exp2(-_LOG2_E * z * z)
    return (wide * torch.where(wide < 0, share, 1 - share)).to(x.dtype)
