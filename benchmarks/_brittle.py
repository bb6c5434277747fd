"""Models on scikit-learn's handwritten digits that post-training int8 breaks, trained here in minutes: four of
different kinds, one whose channels cannot be brought to like size, and one that could have learned more.

Each is trained as usual, and then made brittle by a step that changes nothing it computes in float32: channels get
gains of their own before a layer that takes them back (ReLU lets a positive factor through). So activations have
channels of unlike size, as trained networks do, only more so, and one scale for the whole tensor leaves the small ones
a few levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Array = np.ndarray[Any, Any]
SIDE, CANVAS = 24, 48
SPREAD = 1.2  # standard deviation of the logarithm of the gains


class Separable(nn.Module):
    """Expansion, depthwise convolution, projection; added to what came where the sizes allow."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.expand, self.norm = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.deep, self.norm2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)
        self.adds = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        made = torch.relu(self.norm2(self.deep(torch.relu(self.norm(self.expand(x))))))
        made = self.norm3(self.project(made))
        return x + made if self.adds else made

    def unlike(self, generator: torch.Generator) -> None:
        gains = torch.exp(SPREAD * torch.randn(self.norm.num_features, generator=generator))
        with torch.no_grad():
            self.norm.weight *= gains
            self.norm.bias *= gains
            self.deep.weight /= gains.reshape(-1, 1, 1, 1)


class Backbone(nn.Module):
    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        pairs = zip(widths, widths[1:], strides, strict=False)
        self.blocks = nn.ModuleList(Separable(a, b, stride) for a, b, stride in pairs)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        for block in self.blocks:
            x = block(x)
        return x


class DepthwiseCnn(nn.Module):
    """`unlike` within blocks, or along what the blocks add to."""

    def __init__(self, *, stream: bool = False) -> None:
        super().__init__()
        self.stream = stream
        self.backbone = Backbone((16, 24, 24, 48, 48), (2, 1, 2, 1))
        self.head = nn.Linear(48, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone(image).mean((2, 3)))

    def unlike(self, generator: torch.Generator) -> None:
        """Of what is handed from block to block, where some are sums."""
        blocks: list[Any] = [*self.backbone.blocks]
        writers: list[Any] = []
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            writers = [*writers, block] if block.adds else [block]
            if following is not None and following.adds:
                continue
            gains = torch.exp(SPREAD * torch.randn(block.norm3.num_features, generator=generator))
            readers = [b.expand.weight for b in writers[1:]]
            readers.append(self.head.weight if following is None else following.expand.weight)
            with torch.no_grad():
                for writer in writers:
                    writer.norm3.weight *= gains
                    writer.norm3.bias *= gains
                for weight in readers:
                    weight.div_(gains.reshape(1, -1, *[1] * (weight.dim() - 2)))


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone((16, 32, 32, 64), (2, 2, 1))
        self.head = nn.Linear(64, 64)

    def forward(self, image: Tensor) -> Tensor:
        return functional.normalize(self.head(self.backbone(image).mean((2, 3))), dim=-1)


class Detector(nn.Module):
    """For each of 12 × 12 cells the scores of eleven classes (the last: nothing), and the box of the digit there."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone((8, 16, 32, 32), (2, 2, 1))
        self.scores, self.boxes = nn.Conv2d(32, 11, 1), nn.Conv2d(32, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.backbone(image))
        return self.scores(x), self.boxes(x)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(torch.relu(self.up(self.norm2(x))))

    def unlike(self, generator: torch.Generator) -> None:
        """Of what both halves of the layer hand on within."""
        with torch.no_grad():
            gains = torch.exp(SPREAD * torch.randn(self.up.out_features, generator=generator))
            self.up.weight *= gains[:, None]
            self.up.bias *= gains
            self.down.weight /= gains


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 96
        self.patch, self.place = nn.Conv2d(1, width, 3, 3), nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.layers = nn.ModuleList(Layer(width, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


# Data


def digits(count: int, seed: int, *, judging: bool) -> tuple[Array, Array]:
    """[n, 1, 24, 24] moved, with noise, of one side of a split of the originals; and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    part = slice(-500, None) if judging else slice(None, -500)
    pixels, labels = found.images[part].astype(np.float32) / 16, found.target[part]
    chance = np.random.default_rng(seed)
    rows = chance.integers(len(pixels), size=count)
    large = np.kron(pixels[rows], np.ones((1, 3, 3), np.float32))
    moved = np.stack([np.roll(im, tuple(chance.integers(-3, 4, 2)), (0, 1)) for im in large])
    noisy = moved * chance.uniform(0.7, 1.0, (count, 1, 1)) + 0.08 * chance.standard_normal(moved.shape)
    return noisy.astype(np.float32)[:, None], labels[rows].astype(np.int64)


def canvases(count: int, seed: int, *, judging: bool) -> tuple[Array, Array, Array]:
    """[n, 1, 48, 48] with up to three digits; the class of each cell, and its box (centre and size, in cells)."""
    pixels, labels = digits(4 * count, seed, judging=judging)
    chance = np.random.default_rng(seed)
    image = 0.05 * chance.standard_normal((count, 1, CANVAS, CANVAS)).astype(np.float32)
    classes = np.full((count, 12, 12), 10, np.int64)
    boxes = np.zeros((count, 4, 12, 12), np.float32)
    for i in range(count):
        for j in range(chance.integers(1, 4)):
            top, left = chance.integers(0, CANVAS - SIDE + 1, 2)
            image[i, 0, top : top + SIDE, left : left + SIDE] = np.maximum(
                image[i, 0, top : top + SIDE, left : left + SIDE], pixels[4 * i + j, 0]
            )
            y, x = (top + SIDE / 2) / 4, (left + SIDE / 2) / 4
            cell = (slice(int(y) - 1, int(y) + 2), slice(int(x) - 1, int(x) + 2))
            classes[i][cell] = labels[4 * i + j]
            boxes[i][(slice(None), *cell)] = np.array([y / 12, x / 12, 0.5, 0.5], np.float32)[:, None, None]
    return image, classes, boxes


# Training


def _fit(net: nn.Module, arrays: tuple[Array, ...], loss: Callable[..., Tensor], epochs: int) -> None:
    tensors = [torch.from_numpy(a) for a in arrays]
    size, count = 64, len(tensors[0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (count // size) + 1)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(count)
        for start in range(0, count // size * size, size):
            rows = order[start : start + size]
            optimizer.zero_grad()
            value = loss(net(tensors[0][rows]), *(t[rows] for t in tensors[1:]))
            value.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def _alike(found: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020)."""
    scores = found @ found.T / 0.1
    others = ~torch.eye(len(found), dtype=torch.bool)
    same = (labels[:, None] == labels) & others
    logs = scores - torch.logsumexp(scores.masked_fill(~others, -1e9), 1, keepdim=True)
    return -((logs * same).sum(1) / same.sum(1).clamp(min=1)).mean()


def _detected(found: tuple[Tensor, Tensor], classes: Tensor, boxes: Tensor) -> Tensor:
    scores, places = found
    there = (classes < 10)[:, None]
    weight = torch.ones(11)
    weight[10] = 0.2
    error = functional.smooth_l1_loss(places * there, boxes * there, reduction="sum") / there.sum().clamp(min=1)
    return functional.cross_entropy(scores, classes, weight) + 5 * error


@dataclass(frozen=True)
class Made:
    """Files of one model. `metric`: that its job is judged by. `labelled`: the training data with labels."""

    model: Path
    training: Path
    judging: Path
    metric: str
    labelled: Path | None = None


@dataclass(frozen=True)
class _Recipe:
    """`epochs`, `samples`: of the training as usual. `labels`: whether the data sets have some."""

    net: Callable[[], nn.Module]
    metric: str
    epochs: int = 6
    samples: int = 2500
    labels: bool = False


_RECIPES: Mapping[str, _Recipe] = {
    "depthwise CNN": _Recipe(DepthwiseCnn, "agreement"),
    "small ViT": _Recipe(Vit, "agreement"),
    "embedding": _Recipe(Embedder, "cosine"),
    "detector": _Recipe(Detector, "normalized_error", samples=1500),
    "unlike sums": _Recipe(lambda: DepthwiseCnn(stream=True), "agreement"),
    "half trained": _Recipe(DepthwiseCnn, "top1", epochs=1, samples=2000, labels=True),
}
NAMES = tuple(_RECIPES)


def files(name: str, folder: Path) -> Made:
    """Those in `folder`, made where they are not there."""
    return _made(name, folder) if (folder / "judging.npz").exists() else make(name, folder)


def _made(name: str, folder: Path) -> Made:
    model, training, judging, labelled = (
        folder / f for f in ("model.pt2", "training.npz", "judging.npz", "labelled.npz")
    )
    return Made(model, training, judging, _RECIPES[name].metric, labelled if labelled.exists() else None)


def make(name: str, folder: Path, samples: int = 1500, judging: int = 1500) -> Made:
    """Train (in one thread: such small products are no faster in more), make brittle, export to `.pt2`, and write
    data sets."""
    recipe = _RECIPES[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = recipe.net()
    draw = canvases if isinstance(net, Detector) else digits
    loss = {Detector: _detected, Embedder: _alike}.get(type(net), functional.cross_entropy)
    _fit(net, draw(recipe.samples, 1, judging=False), loss, epochs=recipe.epochs)
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, DepthwiseCnn) if getattr(net, "stream", False) else isinstance(module, Separable | Layer):
            module.unlike(generator)
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    side = CANVAS if isinstance(net, Detector) else SIDE
    batch = torch.export.Dim("batch", min=1, max=256)
    with torch.no_grad():
        program = torch.export.export(net, (torch.zeros(3, 1, side, side),), dynamic_shapes=({0: batch},))
    torch.export.save(program, str(folder / "model.pt2"))
    image, *truth = draw(samples, 2, judging=False)
    np.savez(folder / "training.npz", image=image)
    if recipe.labels:
        np.savez(folder / "labelled.npz", image=image, labels=truth[0])
    image, *truth = draw(judging, 3, judging=True)
    np.savez(folder / "judging.npz", image=image, **({"labels": truth[0]} if recipe.labels else {}))
    return _made(name, folder)
