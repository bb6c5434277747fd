"""Models of `benchmarks/gpu`: ResNet-50, ViT-B/16, BERT-base; seeded weights; as torch modules and as ONNX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_models import SEED, Recipe, export
from zoo import data, language, training, vision

Arrays = dict[str, np.ndarray[Any, Any]]
TOKENS = 128


class ViTLayer(nn.Module):
    """Normalized before the branches, attention by torch's own function."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-6), nn.LayerNorm(hidden, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.query(y)), self.split(self.key(y)), self.split(self.value(y))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.output(mixed)
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2020): 12 layers, hidden 768, 12 heads, 86 M parameters."""

    def __init__(self, layers: int = 12, hidden: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 197, hidden) * 0.02)
        self.layers = nn.ModuleList(ViTLayer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, 1000)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.03)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def sentences(count: int, rng: np.random.Generator) -> Arrays:
    """Word pieces, 32 to 128 of them, padded to 128."""
    ids = np.zeros((count, TOKENS), np.int64)
    mask = np.zeros((count, TOKENS), np.int64)
    for i, length in enumerate(rng.integers(32, TOKENS + 1, count)):
        ids[i, :length] = 999 + np.minimum(rng.zipf(1.2, length), data.VOCABULARY - 1000)
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def images(count: int, rng: np.random.Generator) -> Arrays:
    return {"image": data.textures(count, rng)["image"]}


def resnet50() -> nn.Module:
    """Seeded; BatchNorm has seen images, so that activations keep their size from layer to layer."""
    model = vision.ResNet50()
    training.settle_batchnorm(model, training.pieces(images(32, np.random.default_rng(SEED)), 16))
    return model.eval()


@dataclass(frozen=True)
class Model:
    label: str
    module: Callable[[], nn.Module]
    samples: Callable[[int, np.random.Generator], Arrays]
    output: str


MODELS = {
    "resnet50": Model("ResNet-50", resnet50, images, "logits"),
    "vit": Model("ViT-B/16", lambda: ViT().eval(), images, "logits"),
    "bert": Model("BERT-base, 128 tokens", lambda: language.Classifier().eval(), sentences, "logits"),
}


def make(name: str) -> nn.Module:
    """The module, with the same weights at every call."""
    torch.manual_seed(SEED)
    return MODELS[name].module()


def write(name: str, folder: Path) -> None:
    """`model.onnx` (batch is dynamic) into `folder`."""
    model = MODELS[name]
    recipe = Recipe(model.label, "seeded", model.module, model.samples, {model.output: "cosine"}, "cosine", 0, 0)
    export(make(name), model.samples(2, np.random.default_rng(SEED + 1)), recipe, folder / "model.onnx")
