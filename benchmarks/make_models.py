"""Makes the models and data sets that `models.py` measures: architectures and sizes are real, weights are seeded.

    python benchmarks/make_models.py           # all of them, below build/bench-models/, about 300 MB
    python benchmarks/make_models.py --only lstm

- `resnet50`: ResNet-50 v1.5 (He et al. 2016), 25.6 M parameters, (N, 3, 224, 224) → 1000 logits.
- `minilm`: a BERT encoder of MiniLM's size (6 layers, hidden 384, 12 heads, vocabulary 30,522; 22.6 M parameters),
  mean-pooled to a sentence embedding; batch and sequence are dynamic.
- `lstm`: two layers of 512 over (N, 64, 128) frames → 64 logits.

Deterministic for one version of torch. Statistics are made plausible where random weights have none: BatchNorm has seen
data, and residual branches are small. Needs the `torch` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE = Path(__file__).resolve().parents[1] / "build" / "bench-models"
SEED = 20_261
OPSET = 18
VOCABULARY, LONGEST, TOKENS = 30_522, 512, 32

Arrays = dict[str, np.ndarray[Any, Any]]
Shapes = dict[str, dict[str, list[int]]]


# ResNet-50


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(depth):
                blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(2048, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                # As training leaves it: a branch adds a little to what comes by the shortcut. With 1, sixteen random
                # branches in a row blow the smallest difference up.
                nn.init.constant_(module.norm3.weight, 0.25)

    def forward(self, image: Tensor) -> Tensor:
        maps: Tensor = self.body(self.stem(image))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


def images(count: int, rng: np.random.Generator) -> Arrays:
    """Normalized images with the 1/f spectrum of natural ones, each of its own brightness and contrast."""
    side = 224
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf  # no constant part
    out = np.empty((count, 3, side, side), np.float32)
    for i in range(count):
        grey = rng.standard_normal((1, side, side)) + 0.3 * rng.standard_normal((3, side, side))
        field = np.fft.irfft2(np.fft.rfft2(grey) / frequency, s=(side, side))
        field /= field.std(axis=(1, 2), keepdims=True)
        out[i] = field * rng.uniform(0.5, 1.3) + rng.uniform(-0.7, 0.7)
    return {"image": out}


def make_resnet50() -> nn.Module:
    model = ResNet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over what it sees
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        model.train()
        for _ in range(4):
            model(torch.from_numpy(images(8, rng)["image"]))
    return model.eval()


# BERT encoder


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, hidden // heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.width).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.width) + mask
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        out: Tensor = self.output(mixed.view(x.shape[0], x.shape[1], self.heads * self.width))
        return out


class EncoderLayer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-12), nn.LayerNorm(hidden, eps=1e-12)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        out: Tensor = self.norm2(x + self.narrow(F.gelu(self.wide(x))))
        return out


class SentenceEncoder(nn.Module):
    def __init__(self, layers: int = 6, hidden: int = 384, heads: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, hidden)
        self.positions = nn.Embedding(LONGEST, hidden)
        self.types = nn.Embedding(2, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # BERT's 0.02 leaves an untrained encoder almost an identity; trained weights are about twice as large.
                nn.init.normal_(module.weight, std=0.04)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        at = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.norm(self.words(input_ids) + self.positions(at) + self.types(token_type_ids))
        kept = attention_mask.to(x.dtype)
        mask = (1.0 - kept[:, None, None, :]) * -10000.0
        for layer in self.layers:
            x = layer(x, mask)
        pooled = (x * kept.unsqueeze(-1)).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        return F.normalize(pooled, dim=-1)


def sentences(count: int, rng: np.random.Generator) -> Arrays:
    """Word pieces by Zipf's law between [CLS] and [SEP], 8 to 32 tokens, padded to 32."""
    ids = np.zeros((count, TOKENS), np.int64)
    mask = np.zeros((count, TOKENS), np.int64)
    for i, length in enumerate(rng.integers(8, TOKENS + 1, count)):
        words = 999 + np.minimum(rng.zipf(1.2, length - 2), VOCABULARY - 1000)
        ids[i, :length] = [101, *words, 102]
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def make_minilm() -> nn.Module:
    return SentenceEncoder().eval()


# LSTM


class FrameClassifier(nn.Module):
    def __init__(self, inputs: int = 128, hidden: int = 512, classes: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, frames: Tensor) -> Tensor:
        outputs: Tensor = self.lstm(frames)[0]
        logits: Tensor = self.head(outputs[:, -1])
        return logits


def frames(count: int, rng: np.random.Generator) -> Arrays:
    """Slowly changing features: a first-order autoregression, variance 1."""
    noise = rng.standard_normal((count, 64, 128))
    out = np.empty_like(noise)
    out[:, 0] = noise[:, 0]
    for t in range(1, 64):
        out[:, t] = 0.9 * out[:, t - 1] + math.sqrt(1 - 0.9**2) * noise[:, t]
    return {"frames": out.astype(np.float32)}


def make_lstm() -> nn.Module:
    return FrameClassifier().eval()


# Files


@dataclass(frozen=True)
class Recipe:
    """How a model is made and fed. `sequence`: its second axis is dynamic too."""

    label: str
    module: Callable[[], nn.Module]
    samples: Callable[[int, np.random.Generator], Arrays]
    output: str
    calibration: int
    validation: int
    sequence: bool = False


RECIPES = {
    "resnet50": Recipe("ResNet-50", make_resnet50, images, "logits", 64, 128),
    "minilm": Recipe("MiniLM-size encoder, 32 tokens", make_minilm, sentences, "sentence_embedding", 256, 512, True),
    "lstm": Recipe("LSTM 2 × 512, 64 frames", make_lstm, frames, "logits", 256, 512),
}


@dataclass(frozen=True)
class Case:
    """Files of one model, ready to upload, and the shapes of the job."""

    label: str
    model: Path
    calibration: Path
    validation: Path
    shapes: Shapes


def case(name: str, folder: Path = CACHE) -> Case:
    """The model's files; made where this script, or torch, has changed since."""
    recipe = RECIPES[name]
    source = Path(__file__).read_bytes() + torch.__version__.encode() + onnx.__version__.encode()
    final = folder / f"{name}-{hashlib.sha256(source).hexdigest()[:12]}"
    if not final.is_dir():
        for old in folder.glob(f"{name}-*"):
            shutil.rmtree(old)
        temporary = folder / f".{name}-{os.getpid()}"
        temporary.mkdir(parents=True)
        make(recipe, temporary)
        temporary.rename(final)
    shapes: Shapes = json.loads((final / "shapes.json").read_text())
    return Case(recipe.label, final / "model.onnx", final / "calibration.npz", final / "validation.npz", shapes)


def make(recipe: Recipe, folder: Path) -> None:
    torch.manual_seed(SEED)
    module = recipe.module()
    example = recipe.samples(2, np.random.default_rng(SEED + 1))
    export(module, example, recipe, folder / "model.onnx")
    for seed, (stem, count) in enumerate((("calibration", recipe.calibration), ("validation", recipe.validation))):
        arrays: dict[str, Any] = recipe.samples(count, np.random.default_rng(SEED + 2 + seed))
        np.savez(folder / f"{stem}.npz", **arrays)
    (folder / "shapes.json").write_text(json.dumps(ranges(example, recipe.sequence)))


def ranges(example: Mapping[str, np.ndarray[Any, Any]], sequence: bool) -> Shapes:
    """Batch 1…8; a dynamic sequence of 8…128 tokens, usually 32."""
    out: Shapes = {}
    for name, value in example.items():
        rest = list(value.shape[1:])
        low, high = ([8, *rest[1:]], [128, *rest[1:]]) if sequence else (rest, rest)
        out[name] = {"min": [1, *low], "opt": [8, *rest], "max": [8, *high]}
    return out


def export(module: nn.Module, example: Arrays, recipe: Recipe, path: Path) -> None:
    """By torch's current exporter, as a user would; what it notes of this machine's paths is taken out."""
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=64)}
    if recipe.sequence:
        axes[1] = torch.export.Dim("sequence", min=2, max=LONGEST)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(v) for v in example.values()),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=[recipe.output],
            dynamic_shapes=tuple(axes for _ in example),
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    onnx.save(model, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(RECIPES))
    chosen = parser.parse_args().only
    for each in [chosen] if chosen else RECIPES:
        made = case(each)
        print(f"{made.label}: {made.model} ({made.model.stat().st_size / 1e6:.1f} MB)")
