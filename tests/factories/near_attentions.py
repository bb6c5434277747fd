"""Models that look like attention and are not quite, or like a causal mask and are none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.factories.attention_blocks import HEADS, SIZE, Spelling, Text


class HeadScaled(Text):
    """Almost attention: each head has a scale of its own."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._through(input_ids, lambda scores: scores * torch.linspace(0.1, 0.9, HEADS)[:, None, None])

    def _through(self, input_ids: Tensor, changed: Callable[[Tensor], Tensor], gate: Tensor | None = None) -> Tensor:
        x = self.embedded(input_ids)
        for block in self.blocks:
            a = block.attention
            q, k, v = (p(x).unflatten(2, (HEADS, SIZE)).transpose(1, 2) for p in (a.q, a.k, a.v))
            weights = changed(q @ k.transpose(2, 3)).softmax(-1)
            weights = weights if gate is None else weights * gate
            x = x + a.out((weights @ v).transpose(1, 2).flatten(2))
        return self.norm(x)


class TalkingHeads(HeadScaled):
    """Almost attention: the heads' scores are mixed (Shazeer et al., 2020)."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.mixing = nn.Linear(HEADS, HEADS)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._through(input_ids, lambda scores: self.mixing(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class HeadMasked(HeadScaled):
    """Almost attention: the weights are multiplied by a gate of each head."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._through(input_ids, lambda scores: scores * 0.3, torch.linspace(0, 1, HEADS)[:, None, None])


class Softcapped(HeadScaled):
    """Almost attention: the scores go through a tanh."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._through(input_ids, lambda scores: 5 * torch.tanh(scores / 5))


class Shifted(Text):
    """Almost causal: a query sees the key behind it, too."""

    def forward(self, input_ids: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        return self.through(self.embedded(input_ids), (steps[None, :] <= steps[:, None] + 1)[None, None])


class Windowed(Text):
    """Causal over the last 24 keys: at short lengths it looks like a causal mask."""

    def forward(self, input_ids: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        back = steps[:, None] - steps[None, :]
        return self.through(self.embedded(input_ids), ((back >= 0) & (back < 24))[None, None])
