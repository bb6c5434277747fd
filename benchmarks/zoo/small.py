"""A model whose input is large and whose work is little: what a server adds to a call stands out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from zoo import data


class Pooled(nn.Module):
    """`logits` [N, 8] of `image` [N, 3, 224, 224], of the means of its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.head = nn.AvgPool2d(16), nn.Linear(3 * 14 * 14, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(image).flatten(1))


def make_pooled() -> nn.Module:
    return Pooled().eval()


def unlabelled(count: int, rng: np.random.Generator) -> data.Arrays:
    return {"image": data.textures(count, rng)["image"]}
