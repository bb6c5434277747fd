"""Small seeded torch models with attention as known architectures write it, exported by either exporter of torch.

Every model takes free batch and length.
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

from tests.factories import near_attentions as near
from tests.factories.attention_blocks import HEADS, HIDDEN, LAYERS, LONGEST, SIZE, VOCABULARY, Block, Spelling, Text


class Bert(Text):
    """A mask of keys: added, of the lowest float (`eager`), or of booleans (`sdpa`)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, None, None, :]
        if self.spelling == "eager":
            return self.through(self.embedded(input_ids), (1.0 - mask.float()) * torch.finfo(torch.float32).min)
        return self.through(self.embedded(input_ids), mask.bool().expand(-1, -1, input_ids.shape[1], -1))


class Gpt2(Text):
    """Causal: by the operator's own flag (`sdpa`), or a Where with a slice of a constant triangle (`eager`)."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.register_buffer("triangle", torch.tril(torch.ones(LONGEST, LONGEST)).bool()[None, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.spelling == "sdpa":
            return self.through(self.embedded(input_ids), causal=True)
        length = input_ids.shape[1]
        return self.through(self.embedded(input_ids), self.triangle[:, :, :length, :length])


class PaddedGpt2(Text):
    """Causal, and a mask of keys: queries of padding at the left see no key at all."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        mask = (steps[None, :] <= steps[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        return self.through(self.embedded(input_ids), mask)


class ClipText(Text):
    """A causal mask that is added: a constant of minus infinity above the diagonal, cut to the length."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.register_buffer("causal", torch.full((LONGEST, LONGEST), float("-inf")).triu(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.through(self.embedded(input_ids), self.causal[None, None, :length, :length])
        return x[:, -1]


class ClipPadded(ClipText):
    """With a mask of keys added to the triangle, as CLIP's text tower has it where captions are padded."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]  # one input more
        length, lowest = input_ids.shape[1], torch.finfo(torch.float32).min
        padding = (1.0 - attention_mask[:, None, None, :].float()) * lowest
        return self.through(self.embedded(input_ids), self.causal[None, None, :length, :length] + padding)


def buckets(distance: Tensor, count: int = 32, far: int = 128) -> Tensor:
    """Of T5: half of them for each direction; of these half for one distance each, the others in steps that grow by
    their logarithm, up to `far` (Raffel et al., 2020)."""
    half, exact = count // 2, count // 4
    before, distance = (distance > 0).long() * half, distance.abs()
    grown = torch.log(distance.float() / exact) / math.log(far / exact) * (half - exact)
    grown = torch.min(exact + grown.long(), torch.full_like(distance, half - 1))
    return before + torch.where(distance < exact, distance, grown)


class T5(Text):
    """No scale; a bias by relative position, the same in all layers, and a mask of keys, both added."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling, scaling="none")
        self.relative = nn.Embedding(32, HEADS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        bias = self.relative(buckets(steps[None, :] - steps[:, None])).permute(2, 0, 1)[None]
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


class Decoder(Text):
    """Causal over itself, without a mask over what an encoder said."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling, cross=True)

    def forward(self, input_ids: Tensor, states: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        mask = (steps[None, :] <= steps[:, None])[None, None]
        return self.through(self.embedded(input_ids), mask, states)


class MaskedDecoder(Text):
    """As BART's and T5's decoders: causal and padded over itself, and over what an encoder said with a mask of its
    frames."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling, cross=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, states: Tensor, frame_mask: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        own = (steps[None, :] <= steps[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        seen = frame_mask[:, None, None, :].bool()
        if self.spelling == "sdpa":
            seen = seen.expand(-1, -1, input_ids.shape[1], -1)
        x = self.embedded(input_ids)
        for block in self.blocks:
            x = block(x, own, states, False, seen)
        return self.norm(x)


class WhisperDecoder(nn.Module):
    """Keys without a bias, queries scaled before they are split; a constant triangle of minus infinity, cut to the
    length, over itself, and no mask over the encoder's states."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Parameter(torch.randn(LONGEST, HIDDEN) * 0.1)
        self.blocks = nn.ModuleList(Block(spelling, cross=True, scaling="queries") for _ in range(LAYERS))
        for block in self.blocks:
            for attention in (block.attention, block.cross):
                attention.k = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.register_buffer("causal", torch.full((LONGEST, LONGEST), float("-inf")).triu(1))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, input_ids: Tensor, states: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.positions[:length]
        for block in self.blocks:
            x = block(x, self.causal[:length, :length], states)
        return self.norm(x) @ self.words.weight.T


class Gpt2Merged(nn.Module):
    """As GPT-2 itself: queries, keys and values by one product that is split, the triangle by its own flag or as a
    Where; the head is the table of words."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.words, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.merged = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
        self.register_buffer("triangle", torch.tril(torch.ones(LONGEST, LONGEST)).bool()[None, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        x = self.words(input_ids) + self.positions(torch.arange(length))
        for merged, out, norm in zip(self.merged, self.out, self.norms, strict=True):
            q, k, v = (
                part.view(batch, length, HEADS, SIZE).transpose(1, 2) for part in merged(norm(x)).split(HIDDEN, dim=2)
            )
            if self.spelling == "sdpa":
                context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], SIZE**0.5)
                scores = torch.where(self.triangle[:, :, :length, :length], scores, torch.finfo(torch.float32).min)
                context = torch.matmul(functional.softmax(scores, dim=-1), v)
            x = x + out(context.transpose(1, 2).reshape(batch, length, HIDDEN))
        return x @ self.words.weight.T


class TorchLayers(nn.Module):
    """torch's own layers, with a mask of keys (`MultiheadAttention` merges the three products by itself)."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True) for _ in range(LAYERS))
        self.weights = spelling == "eager"  # asked for its weights, it computes in products and a softmax

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = x + layer(x, x, x, key_padding_mask=attention_mask == 0, need_weights=self.weights)[0]
        return x


class Flattened(Text):
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


def _ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 12))


def _padded_ids() -> tuple[Tensor, ...]:
    return _ids(), torch.ones(2, 12, dtype=torch.int64)


@dataclass(frozen=True)
class Kind:
    make: Callable[[Spelling], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    free: Mapping[str, Mapping[int, str]]


_TEXT = {"input_ids": {0: "batch", 1: "sequence"}}
_MASKED = {**_TEXT, "attention_mask": {0: "batch", 1: "sequence"}}
KINDS: dict[str, Kind] = {
    "bert": Kind(Bert, _padded_ids, _MASKED),
    "vit": Kind(Vit, lambda: (torch.randn(2, 3, 16, 16),), {"pixel_values": {0: "batch"}}),
    "gpt2": Kind(Gpt2, lambda: (_ids(),), _TEXT),
    "padded_gpt2": Kind(PaddedGpt2, _padded_ids, _MASKED),
    "clip_text": Kind(ClipText, lambda: (_ids(),), _TEXT),
    "windowed": Kind(near.Windowed, lambda: (_ids(),), _TEXT),
    "whisper_encoder": Kind(WhisperEncoder, lambda: (torch.randn(2, 8, 24),), {"input_features": {0: "batch"}}),
    "t5": Kind(T5, _padded_ids, _MASKED),
    "clip_padded": Kind(ClipPadded, _padded_ids, _MASKED),
    "gpt2_merged": Kind(Gpt2Merged, lambda: (_ids(),), _TEXT),
    "torch_layers": Kind(TorchLayers, _padded_ids, _MASKED),
    # TorchScript's exporter writes the length of its inputs into torch's own layers.
    "torch_layers_of_12": Kind(TorchLayers, _padded_ids, {name: {0: "batch"} for name in _MASKED}),
    "shifted": Kind(near.Shifted, lambda: (_ids(),), _TEXT),
    "masked_decoder": Kind(
        MaskedDecoder,
        lambda: (*_padded_ids(), torch.randn(2, 9, HIDDEN), torch.ones(2, 9, dtype=torch.int64)),
        {**_MASKED, "states": {0: "batch", 1: "frames"}, "frame_mask": {0: "batch", 1: "frames"}},
    ),
    "whisper_decoder": Kind(
        WhisperDecoder, lambda: (_ids(), torch.randn(2, 9, HIDDEN)), {**_TEXT, "states": {0: "batch", 1: "frames"}}
    ),
    "decoder": Kind(
        Decoder,
        lambda: (_ids(), torch.randn(2, 9, HIDDEN)),
        {**_TEXT, "states": {0: "batch", 1: "frames"}},
    ),
    "flattened": Kind(Flattened, _padded_ids, _MASKED),
    "softcapped": Kind(near.Softcapped, lambda: (_ids(),), _TEXT),
    "head_scaled": Kind(near.HeadScaled, lambda: (_ids(),), _TEXT),
    "head_masked": Kind(near.HeadMasked, lambda: (_ids(),), _TEXT),
    "talking_heads": Kind(near.TalkingHeads, lambda: (_ids(),), _TEXT),
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
        torch.backends.mha.set_fastpath_enabled(False)  # an operator of torch's own, which no exporter knows
        torch.onnx.export(model, inputs, str(path), input_names=list(kind.free), **options)
    return onnx.load(path)
