"""Models of `benchmarks/gpu`: ResNet-50, EfficientNet-B0, ConvNeXt-T, ViT-B/16, BERT-base, a detector as DETR is.

Weights are seeded. As torch modules and as ONNX."""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(folder) for folder in (Path(__file__).resolve().parent, *Path(__file__).resolve().parents[1:3])]
import networks
from zoo import data, language, training, vision

from workers.artifacts import PROGRAM_FILE
from workers.graph.interface import Interface
from workers.kernel import Reporter, TensorSpec

SEED = vision.SEED
MOST = 64  # the largest batch of an exported program
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
    """`layouts`: whether convolutions are laid out with channels last, as a job's candidates are (`_layouts` of
    `workers.backends.inductor.recipes`); `convolutions`: torch's contenders are tried in both."""

    label: str
    module: Callable[[], nn.Module]
    samples: Callable[[int, np.random.Generator], Arrays]
    outputs: tuple[str, ...] = ("logits",)
    convolutions: bool = False
    layouts: tuple[bool, ...] = (False,)

    def named(self, found: Any) -> Arrays:
        """What a module of it gave, as float32 arrays by name."""
        values = found if isinstance(found, tuple | list) else (found,)
        return {name: v.float().cpu().numpy() for name, v in zip(self.outputs, values, strict=True)}


MODELS = {
    "resnet50": Model("ResNet-50", lambda: settled(vision.ResNet50()), images, convolutions=True, layouts=(True,)),
    "efficientnet": Model(
        "EfficientNet-B0", lambda: settled(networks.EfficientNet()), images, convolutions=True, layouts=(True,)
    ),
    "convnext": Model(
        "ConvNeXt-T", lambda: networks.ConvNeXt().eval(), images, convolutions=True, layouts=(True, False)
    ),
    "vit": Model("ViT-B/16", lambda: networks.ViT().eval(), images),
    "bert": Model("BERT-base, 128 tokens", lambda: language.Classifier().eval(), sentences),
    "detr": Model(
        "DETR-like, 512 × 512",
        lambda: settled(networks.Detr(), scenes),
        scenes,
        outputs=("classes", "boxes"),
        convolutions=True,
        layouts=(True, False),
    ),
}


def make(name: str) -> nn.Module:
    """The module, with the same weights at every call."""
    return copy.deepcopy(_made(name))


@functools.cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return MODELS[name].module()


def write(name: str, folder: Path, module: nn.Module) -> None:
    """`model.onnx` (batch is dynamic) into `folder`."""
    from make_models import Recipe, export

    model = MODELS[name]
    judged = dict.fromkeys(model.outputs, "cosine")
    recipe = Recipe(model.label, "seeded", model.module, model.samples, judged, "cosine", 0, 0)
    export(module, model.samples(2, np.random.default_rng(SEED + 1)), recipe, folder / "model.onnx")


def program(name: str, folder: Path, module: nn.Module) -> None:
    """The model as a user uploads it: exported with a dynamic batch, and what its inputs and outputs are called."""
    feeds = MODELS[name].samples(2, np.random.default_rng(1))
    batch = torch.export.Dim("batch", min=1, max=MOST)
    args = tuple(torch.from_numpy(a) for a in feeds.values())
    with torch.no_grad():
        exported = torch.export.export(module, args, dynamic_shapes=tuple({0: batch} for _ in args))
        found = MODELS[name].named(module(*args))
    folder.mkdir(parents=True)
    torch.export.save(exported, str(folder / PROGRAM_FILE))
    inputs = tuple(TensorSpec(n, str(a.dtype), ("batch", *a.shape[1:])) for n, a in feeds.items())
    outputs = tuple(TensorSpec(n, str(a.dtype), ("batch", *a.shape[1:])) for n, a in found.items())
    Interface(inputs, outputs).write(folder)


class Said(Reporter):
    """What stages and builds note goes to stderr."""

    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None:
        say(f"    note: {message} {facts or ''}"[:300])


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


_BEGAN = time.monotonic()
