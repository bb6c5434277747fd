"""What the models with attention are made of: attention in two spellings, a block, and a text model of such blocks.

`spelling`: `sdpa`, by `scaled_dot_product_attention`, as today's implementations; `eager`, in products and a softmax,
as those of some years ago.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Spelling = Literal["sdpa", "eager"]
HIDDEN, HEADS, LAYERS, VOCABULARY, LONGEST = 32, 4, 2, 50, 40
SIZE = HIDDEN // HEADS


class Attention(nn.Module):
    """`scaling`: where the scores are scaled: `scores`, `queries` (before they are split, as Whisper), `none` (as
    T5)."""

    def __init__(self, spelling: Spelling, scaling: str = "scores") -> None:
        super().__init__()
        self.spelling, self.scaling = spelling, scaling
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], HEADS, SIZE).transpose(1, 2)

        source = x if other is None else other
        projected = self.q(x) * SIZE**-0.5 if self.scaling == "queries" else self.q(x)
        q, k, v = split(projected), split(self.k(source)), split(self.v(source))
        scale = SIZE**-0.5 if self.scaling == "scores" else 1.0
        if self.spelling == "sdpa":
            context = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
        else:
            scores = torch.matmul(q, k.transpose(-1, -2))
            if self.scaling == "scores":
                scores = scores / math.sqrt(SIZE)
            if mask is not None and mask.dtype == torch.bool:
                lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
                scores = torch.where(mask, scores, lowest)
            elif mask is not None:
                scores = scores + mask
            context = torch.matmul(functional.softmax(scores, dim=-1), v)
        joined = context.transpose(1, 2).reshape(x.shape[0], x.shape[1], HIDDEN)
        return self.out(joined)


class Block(nn.Module):
    def __init__(self, spelling: Spelling, *, cross: bool = False, scaling: str = "scores") -> None:
        super().__init__()
        self.attention = Attention(spelling, scaling)
        self.cross = Attention(spelling, scaling) if cross else None
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        other: Tensor | None = None,
        causal: bool = False,
        seen: Tensor | None = None,
    ) -> Tensor:
        """`seen`: a mask over `other`."""
        x = x + self.attention(self.norms[0](x), mask, None, causal)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), seen, other)
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Text(nn.Module):
    def __init__(self, spelling: Spelling, **of_block: Any) -> None:
        super().__init__()
        self.spelling = spelling
        self.words, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.blocks = nn.ModuleList(Block(spelling, **of_block) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))

    def through(
        self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        for block in self.blocks:
            x = block(x, mask, other, causal)
        return self.norm(x)
