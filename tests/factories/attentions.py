"""Small seeded torch models with attention as known architectures write it, exported by either exporter of torch.

`spelling`: `sdpa`, by `scaled_dot_product_attention`, as today's implementations; `eager`, in products and a softmax,
as those of some years ago. Every model takes free batch and length.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional

Spelling = Literal["sdpa", "eager"]
HIDDEN, HEADS, LAYERS, VOCABULARY, LONGEST = 32, 4, 1, 50, 40
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
        self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        x = x + self.attention(self.norms[0](x), mask, None, causal)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), None, other)
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class _Text(nn.Module):
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


class Bert(_Text):
    """A mask of keys: added, of the lowest float (`eager`), or of booleans (`sdpa`)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, None, None, :]
        if self.spelling == "eager":
            return self.through(self.embedded(input_ids), (1.0 - mask.float()) * torch.finfo(torch.float32).min)
        return self.through(self.embedded(input_ids), mask.bool().expand(-1, -1, input_ids.shape[1], -1))


class Gpt2(_Text):
    """Causal: by the operator's own flag (`sdpa`), or a Where with a slice of a constant triangle (`eager`)."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.register_buffer("triangle", torch.tril(torch.ones(LONGEST, LONGEST)).bool()[None, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.spelling == "sdpa":
            return self.through(self.embedded(input_ids), causal=True)
        length = input_ids.shape[1]
        return self.through(self.embedded(input_ids), self.triangle[:, :, :length, :length])


class PaddedGpt2(_Text):
    """Causal, and a mask of keys: queries of padding at the left see no key at all."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        mask = (steps[None, :] <= steps[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        return self.through(self.embedded(input_ids), mask)


class ClipText(_Text):
    """A causal mask that is added: a constant of minus infinity above the diagonal, cut to the length."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.register_buffer("causal", torch.full((LONGEST, LONGEST), float("-inf")).triu(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.through(self.embedded(input_ids), self.causal[None, None, :length, :length])
        return x[:, -1]


class Windowed(_Text):
    """Causal over the last 24 keys: at short lengths it looks like a causal mask."""

    def forward(self, input_ids: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        back = steps[:, None] - steps[None, :]
        return self.through(self.embedded(input_ids), ((back >= 0) & (back < 24))[None, None])


class T5(_Text):
    """No scale; a bias by relative position, the same in all layers, and a mask of keys, both added."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling, scaling="none")
        self.relative = nn.Embedding(16, HEADS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        buckets = (steps[None, :] - steps[:, None]).clamp(-8, 7) + 8
        bias = self.relative(buckets).permute(2, 0, 1)[None]
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        return self.through(self.words(input_ids), bias + mask)


class Vit(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 4, 4)
        self.blocks = nn.ModuleList(Block(spelling) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class WhisperEncoder(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, HIDDEN, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(spelling, scaling="queries") for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, input_features: Tensor) -> Tensor:
        x = functional.gelu(self.conv(input_features)).permute(0, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(_Text):
    """Causal over itself, without a mask over what an encoder said."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling, cross=True)

    def forward(self, input_ids: Tensor, states: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        mask = (steps[None, :] <= steps[:, None])[None, None]
        return self.through(self.embedded(input_ids), mask, states)


class Flattened(_Text):
    """As CLIP, BART and Whisper were written for years: products of [batch · heads, length, size], between which the
    scores are taken apart to be masked."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedded(input_ids)
        batch, length = input_ids.shape
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        mask = mask.expand(batch, 1, length, length)
        for block in self.blocks:
            a = block.attention

            def split(y: Tensor) -> Tensor:
                return y.view(batch, -1, HEADS, SIZE).transpose(1, 2).contiguous().view(batch * HEADS, -1, SIZE)

            scores = torch.bmm(split(a.q(x) * SIZE**-0.5), split(a.k(x)).transpose(1, 2))
            scores = (scores.view(batch, HEADS, length, length) + mask).view(batch * HEADS, length, length)
            context = torch.bmm(functional.softmax(scores, dim=-1), split(a.v(x)))
            context = context.view(batch, HEADS, length, SIZE).transpose(1, 2)
            x = x + a.out(context.reshape(batch, length, HIDDEN))
        return self.norm(x)


class Softcapped(_Text):
    """Almost attention: the scores go through a tanh."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedded(input_ids)
        for block in self.blocks:
            q, k, v = (p(x).unflatten(2, (HEADS, SIZE)).transpose(1, 2) for p in (block.attention.q, block.attention.k,
                                                                                 block.attention.v))  # fmt: skip
            scores = 5 * torch.tanh(q @ k.transpose(2, 3) / 5)
            x = x + block.attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.norm(x)


def _ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 12))


@dataclass(frozen=True)
class Kind:
    make: Callable[[Spelling], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    free: Mapping[str, Mapping[int, str]]


_TEXT = {"input_ids": {0: "batch", 1: "sequence"}}
_MASKED = {**_TEXT, "attention_mask": {0: "batch", 1: "sequence"}}
KINDS: dict[str, Kind] = {
    "bert": Kind(Bert, lambda: (_ids(), torch.ones(2, 12, dtype=torch.int64)), _MASKED),
    "vit": Kind(Vit, lambda: (torch.randn(2, 3, 16, 16),), {"pixel_values": {0: "batch"}}),
    "gpt2": Kind(Gpt2, lambda: (_ids(),), _TEXT),
    "padded_gpt2": Kind(PaddedGpt2, lambda: (_ids(), torch.ones(2, 12, dtype=torch.int64)), _MASKED),
    "clip_text": Kind(ClipText, lambda: (_ids(),), _TEXT),
    "windowed": Kind(Windowed, lambda: (_ids(),), _TEXT),
    "whisper_encoder": Kind(WhisperEncoder, lambda: (torch.randn(2, 8, 24),), {"input_features": {0: "batch"}}),
    "t5": Kind(T5, lambda: (_ids(), torch.ones(2, 12, dtype=torch.int64)), _MASKED),
    "decoder": Kind(
        Decoder,
        lambda: (_ids(), torch.randn(2, 9, HIDDEN)),
        {**_TEXT, "states": {0: "batch", 1: "frames"}},
    ),
    "flattened": Kind(Flattened, lambda: (_ids(), torch.ones(2, 12, dtype=torch.int64)), _MASKED),
    "softcapped": Kind(Softcapped, lambda: (_ids(),), _TEXT),
}


def export(
    name: str, spelling: Spelling, exporter: Literal["dynamo", "torchscript"], opset: int, folder: Path
) -> ModelProto:
    kind = KINDS[name]
    torch.manual_seed(0)
    model, inputs = kind.make(spelling).eval(), kind.inputs()
    path = folder / f"{name}-{spelling}-{exporter}-{opset}.onnx"
    options: dict[str, Any] = {"dynamo": exporter == "dynamo", "opset_version": opset, "output_names": ["y"]}
    if exporter == "dynamo":
        dims = {n: torch.export.Dim(n, min=2, max=LONGEST if n == "sequence" else 64)
                for axes in kind.free.values() for n in axes.values()}  # fmt: skip
        shapes = tuple({axis: dims[n] for axis, n in axes.items()} for axes in kind.free.values())
        options |= {"dynamic_shapes": shapes, "verbose": False, "external_data": False}
    else:
        options["dynamic_axes"] = {name: dict(axes) for name, axes in kind.free.items()}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(model, inputs, str(path), input_names=list(kind.free), **options)
    return onnx.load(path)
