"""Three more networks on images: SqueezeNet, DenseNet-121, and a U-Net that labels every pixel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import data
from zoo.training import pieces, settle_batchnorm, train_classifier
from zoo.vision import conv_norm, kaiming, trained_on_crops

SEED = 20_261


# SqueezeNet 1.1 (Iandola et al. 2016): no normalization, and a classifier that is a quarter of its work


class Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.narrow, self.wide = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], dim=1)


class SqueezeNet(nn.Module):
    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()),
            *(Fire(128, 32, 128), Fire(256, 32, 128), pool()),
            *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
        )
        self.head = nn.Conv2d(512, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image)).mean(dim=(2, 3))


# DenseNet-121 (Huang et al. 2017): every layer reads what all before it wrote, normalized anew


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.narrow = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.wide = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.relu(self.norm1(x)))
        return torch.cat([x, self.wide(F.relu(self.norm2(y)))], dim=1)


class DenseNet(nn.Module):
    def __init__(self, plan: tuple[int, ...] = (6, 12, 24, 16), growth: int = 32) -> None:
        super().__init__()
        width = 2 * growth
        blocks: list[nn.Module] = [conv_norm(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for place, depth in enumerate(plan):
            for _ in range(depth):
                blocks.append(DenseLayer(width, growth))
                width += growth
            blocks += [nn.BatchNorm2d(width), nn.ReLU()]
            if place < len(plan) - 1:
                blocks += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
        self.body, self.head = nn.Sequential(*blocks), nn.Linear(width, 1000)
        kaiming(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean(dim=(2, 3)))


# U-Net (Ronneberger et al. 2015), with batch norms and padded convolutions


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_norm(inputs, outputs, 3), nn.ReLU(), conv_norm(outputs, outputs, 3), nn.ReLU())


class UNet(nn.Module):
    """[N, 3, H, W] → logits [N, 21, H, W] (0 = background)."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        sizes = [width << level for level in range(depth)]
        self.down = nn.ModuleList(twice(i, o) for i, o in zip((3, *sizes), sizes, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * o, o, 2, 2) for o in reversed(sizes[:-1]))
        self.join = nn.ModuleList(twice(2 * o, o) for o in reversed(sizes[:-1]))
        self.head = nn.Conv2d(width, data.TEXTURES + 1, 1)
        kaiming(self)

    def forward(self, image: Tensor) -> Tensor:
        x, kept = image, []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for up, join, side in zip(self.up, self.join, reversed(kept[:-1]), strict=True):
            x = join(torch.cat([up(x), side], dim=1))
        return self.head(x)


def faint(count: int, rng: np.random.Generator) -> data.Arrays:
    """Unlabelled images whose textures hardly stand out: many are near to the border of two classes."""
    found = [0.7 * data.natural(rng, data.SIDE) + 0.6 * _texture(rng) for _ in range(count)]
    return {"image": np.stack(found).astype(np.float32)}


def _texture(rng: np.random.Generator) -> data.Array:
    return data.texture(int(rng.integers(0, data.TEXTURES)), rng, data.SIDE, data.SIDE)


def unlabelled(count: int, rng: np.random.Generator) -> data.Arrays:
    """Images to label pixel by pixel; how alike the labels are is judged."""
    return {"image": data.masks(count, rng)["image"]}


def make_squeezenet() -> nn.Module:
    model = SqueezeNet()
    crops = data.textures(2048, np.random.default_rng(SEED), 64)
    train_classifier(model, crops, epochs=8, size=32, rate=1e-3)
    return model


def make_densenet() -> nn.Module:
    return trained_on_crops(DenseNet(), 512, 3)


def make_unet() -> nn.Module:
    """Trained on small images, whose normalizations then see large ones."""
    model, rng = UNet(), np.random.default_rng(SEED)
    train_classifier(model, data.masks(256, rng, 64), epochs=4, size=16, rate=3e-3)
    settle_batchnorm(model, pieces(data.masks(32, rng), 8))
    return model
