"""Modules that round as int8 engines do, and let gradients through (the straight-through estimator). Needs torch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Activations = Literal["uint8", "int8"]

_FORGETS = (
    0.02  # of the distance to the extremes of a batch, by which a range shrinks at each: about those of 50 batches
)
_LEAST_SCALE = 1e-10


class RoundedActivation(nn.Module):
    """One scale for the whole tensor: uint8 with a zero point (x86), or int8 without (what GPUs take).

    `observing`: the range follows the extremes of what it sees, as a calibration by them will; `rounding`: whether it
    rounds. Before anything was seen it passes on what comes.
    """

    low: Tensor
    high: Tensor

    def __init__(self, activations: Activations) -> None:
        super().__init__()
        self.signed = activations == "int8"
        self.observing, self.rounding = False, True
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing and x.numel():
            low, high = torch.aminmax(x.detach())
            if self.low <= self.high:
                low = torch.minimum(low, torch.lerp(self.low, low, _FORGETS))
                high = torch.maximum(high, torch.lerp(self.high, high, _FORGETS))
            self.low.copy_(low)
            self.high.copy_(high)
        if not self.rounding or not bool(self.low <= self.high):
            return x
        low, high = self.low.clamp(max=0.0), self.high.clamp(min=0.0)
        if self.signed:
            scale = (torch.maximum(-low, high) / 127).clamp(min=_LEAST_SCALE)
            zero = torch.zeros((), dtype=torch.int32, device=x.device)
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, -127, 127)
        scale = ((high - low) / 255).clamp(min=_LEAST_SCALE)
        zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


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
    """Set all of them."""
    for part in module.modules():
        if isinstance(part, RoundedActivation):
            part.observing, part.rounding = observing, rounding
        elif isinstance(part, RoundedWeight):
            part.rounding = rounding
