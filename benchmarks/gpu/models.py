"""Models of `benchmarks/gpu`: ResNet-50, EfficientNet-B0, ConvNeXt-T, ViT-B/16, BERT-base, a detector as DETR is.

Weights are seeded. As torch modules and as ONNX."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import networks
from zoo import data, language, training, vision

SEED = vision.SEED
Arrays = dict[str, np.ndarray[Any, Any]]
TOKENS = 128


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


def scenes(count: int, rng: np.random.Generator) -> Arrays:
    return {"image": data.textures(count, rng, 512)["image"]}


def settled(model: nn.Module, samples: Callable[[int, np.random.Generator], Arrays] = images) -> nn.Module:
    """BatchNorm has seen images, so that activations keep their size from layer to layer."""
    training.settle_batchnorm(model, training.pieces(samples(16, np.random.default_rng(SEED)), 8))
    return model.eval()


@dataclass(frozen=True)
class Model:
    label: str
    module: Callable[[], nn.Module]
    samples: Callable[[int, np.random.Generator], Arrays]
    outputs: tuple[str, ...] = ("logits",)
    convolutions: bool = False

    def named(self, found: Any) -> Arrays:
        """What a module of it gave, as float32 arrays by name."""
        values = found if isinstance(found, tuple | list) else (found,)
        return {name: v.float().cpu().numpy() for name, v in zip(self.outputs, values, strict=True)}


MODELS = {
    "resnet50": Model("ResNet-50", lambda: settled(vision.ResNet50()), images, convolutions=True),
    "efficientnet": Model("EfficientNet-B0", lambda: settled(networks.EfficientNet()), images, convolutions=True),
    "convnext": Model("ConvNeXt-T", lambda: networks.ConvNeXt().eval(), images, convolutions=True),
    "vit": Model("ViT-B/16", lambda: networks.ViT().eval(), images),
    "bert": Model("BERT-base, 128 tokens", lambda: language.Classifier().eval(), sentences),
    "detr": Model(
        "DETR-like, 512 × 512",
        lambda: settled(networks.Detr(), scenes),
        scenes,
        outputs=("classes", "boxes"),
        convolutions=True,
    ),
}


def make(name: str) -> nn.Module:
    """The module, with the same weights at every call."""
    return copy.deepcopy(_made(name))


@functools.cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return MODELS[name].module()


def write(name: str, folder: Path) -> None:
    """`model.onnx` (batch is dynamic) into `folder`."""
    from make_models import Recipe, export

    model = MODELS[name]
    judged = dict.fromkeys(model.outputs, "cosine")
    recipe = Recipe(model.label, "seeded", model.module, model.samples, judged, "cosine", 0, 0)
    export(make(name), model.samples(2, np.random.default_rng(SEED + 1)), recipe, folder / "model.onnx")
