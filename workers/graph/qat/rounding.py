"""Modules that round as int8 engines do, and let gradients through (the straight-through estimator). Needs torch.

The range of an activation is learned with the weights: its size as the logarithm of the scale (Jain et al. 2020,
"Trained quantization thresholds"), by the gradient of LSQ (Esser et al. 2020): where it is too wide all values are
rounded coarsely, where it is too narrow the largest are cut. Which of the levels is zero is settled by calibration.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Activations = Literal["uint8", "int8"]

_LEAST_SCALE = 1e-10
_FARTHEST = 7.0  # that the logarithm of a scale goes from where it began: a thousandth, or a thousand times of it


class _Rounded(torch.autograd.Function):
    """(x, logarithm of the scale) → x rounded to scale · (0 … 255 less `zero`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, zero: Tensor, least: int, most: int) -> Tensor:
        scale = log_scale.exp()
        made = torch.fake_quantize_per_tensor_affine(x, scale, zero, least, most)
        ends = ((least - zero - 0.5) * scale, (most - zero + 0.5) * scale)
        ctx.save_for_backward(x, made, *ends)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, made, low, high = ctx.saved_tensors
        within = (x >= low) & (x <= high)
        passed = gradient * within
        # Of y = s·round(x/s): y - x; of what is cut, s·level: y. By the logarithm, so that s is gone.
        return passed, (gradient * made - passed * x).sum(), None, None, None


class RoundedActivation(nn.Module):
    """One scale for the whole tensor: uint8 with a zero point (x86), or int8 without (what GPUs take).

    `observing`: notes the extremes of what it sees, from which `settle` makes the range; `rounding`: whether it rounds.
    Before that it passes on what comes. `bounded`: what it sees is cut by the program itself (ReLU6, say), which
    engines leave to the range, so that this never grows.
    """

    low: Tensor
    high: Tensor
    zero: Tensor
    start: Tensor

    def __init__(self, activations: Activations, *, bounded: bool = False) -> None:
        super().__init__()
        self.least, self.most = (-127, 127) if activations == "int8" else (0, 255)
        self.observing, self.rounding, self.bounded = False, True, bounded
        self.log_scale = nn.Parameter(torch.tensor(math.nan))
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("start", torch.tensor(math.nan))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing and x.numel():
            low, high = torch.aminmax(x.detach())
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        if not self.rounding or not self.settled:
            return x
        made: Tensor = _Rounded.apply(x, self.log_scale, self.zero, self.least, self.most)  # type: ignore[no-untyped-call]
        return made

    def forget(self) -> None:
        """Extremes and range."""
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)

    @property
    def settled(self) -> bool:
        return bool(self.low <= self.high)

    def settle(self) -> None:
        """The range from the extremes, zero included."""
        if not self.settled:
            return
        low, high = self.low.clamp(max=0.0), self.high.clamp(min=0.0)
        if self.least < 0:
            scale = (torch.maximum(-low, high) / self.most).clamp(min=_LEAST_SCALE)
        else:
            scale = ((high - low) / self.most).clamp(min=_LEAST_SCALE)
            self.zero.copy_((-low / scale).nan_to_num().round().clamp(self.least, self.most))
        with torch.no_grad():
            self.log_scale.copy_(scale.log())
            self.start.copy_(self.log_scale)

    def keep_bound(self) -> None:
        if self.settled:
            with torch.no_grad():
                self.log_scale.clamp_(self.start - _FARTHEST, self.start + (0.0 if self.bounded else _FARTHEST))

    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest value that it passes on; None where nothing came by."""
        if not self.settled:
            return None
        scale, zero = math.exp(float(self.log_scale)), int(self.zero)
        return (self.least - zero) * scale, (self.most - zero) * scale


class RoundedWeight(nn.Module):
    """int8, symmetric, one scale for each output channel, which lies on `axis`; `levels` on either side of zero."""

    def __init__(self, axis: int, levels: int) -> None:
        super().__init__()
        self.axis, self.levels, self.rounding = axis, levels, True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.rounding:
            return weight
        axis = self.axis % weight.dim()
        others = [d for d in range(weight.dim()) if d != axis]
        largest = weight.detach().abs().amax(dim=others) if others else weight.detach().abs()
        scale = (largest / self.levels).clamp(min=_LEAST_SCALE)
        zeros = torch.zeros(weight.shape[axis], dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -self.levels, self.levels)


class RoundedAttention(nn.Module):
    """`scaled_dot_product_attention` as the products that it is in ONNX, whose inputs are rounded."""

    def __init__(self, activations: Activations) -> None:
        super().__init__()
        self.query, self.key, self.weights, self.value = (RoundedActivation(activations) for _ in range(4))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002  (of training, and the program was exported for inference)
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        root = math.sqrt(1 / math.sqrt(query.size(-1)) if scale is None else scale)
        scores = self.query(query * root) @ self.key(key.transpose(-2, -1) * root)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        product: Tensor = self.weights(torch.softmax(scores, -1)) @ self.value(value)
        return product


def observe(module: nn.Module, *, observing: bool, rounding: bool) -> None:
    """Set all of them; ranges are settled when observing ends."""
    for part in module.modules():
        if isinstance(part, RoundedActivation):
            if part.observing and not observing:
                part.settle()
            part.observing, part.rounding = observing, rounding
        elif isinstance(part, RoundedWeight):
            part.rounding = rounding


def keep_bounds(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, RoundedActivation):
            part.keep_bound()


def ranges_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are ranges, and no weights of the program."""
    return [part.log_scale for part in module.modules() if isinstance(part, RoundedActivation)]
