"""Networks on images: ResNet-50, MobileNetV2, a small depthwise net on digits, ViT-S/16, a one-stage detector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import data
from zoo.language import EncoderLayer, sharpen
from zoo.training import one_hot, pieces, ridge, settle_batchnorm, train_classifier, uneven_channels

SEED = 20_261
CROP = 64
HELD_OUT = 797  # as in examples/digits: the later digits are mostly by other writers


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


def kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# ResNet-50 v1.5 (He et al. 2016)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.first = conv_norm(inputs, width, 1)
        self.second = conv_norm(width, width, 3, stride)
        self.third = conv_norm(width, outputs, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))) + self.shortcut(x))


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        inputs = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(depth):
                blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(2048, 1000)
        kaiming(self)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                # As training leaves it: a branch adds a little to what comes by the shortcut. With 1, sixteen random
                # branches in a row blow the smallest difference up.
                nn.init.constant_(module.third[1].weight, 0.25)

    def features(self, image: Tensor) -> Tensor:
        return self.body(self.stem(image)).mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


# MobileNetV2 (Sandler et al. 2018)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.wide = conv_norm(inputs, wide, 1) if expand > 1 else nn.Identity()
        self.depthwise = conv_norm(wide, wide, 3, stride, groups=wide)
        self.narrow = conv_norm(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.wide(x)) if not isinstance(self.wide, nn.Identity) else x
        y = self.narrow(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """`plan`: rows of (expansion, channels, repeats, stride). `side`: the input is resized to it inside."""

    PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(
        self,
        plan: tuple[tuple[int, int, int, int], ...] = PLAN,
        colours: int = 3,
        stem: int = 32,
        last: int = 1280,
        classes: int = 1000,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.side = side
        blocks: list[nn.Module] = [conv_norm(colours, stem, 3, 2), nn.ReLU6()]
        inputs = stem
        for expand, channels, repeats, stride in plan:
            for i in range(repeats):
                blocks.append(InvertedResidual(inputs, channels, stride if i == 0 else 1, expand))
                inputs = channels
        self.body = nn.Sequential(*blocks, conv_norm(inputs, last, 1), nn.ReLU6())
        self.head = nn.Linear(last, classes)
        kaiming(self)

    def features(self, image: Tensor) -> Tensor:
        if self.side is not None:
            image = F.interpolate(image / 16.0, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.body(image).mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


# ViT-S/16 (Dosovitskiy et al. 2021; Touvron et al. 2021)


class ViT(nn.Module):
    def __init__(self, layers: int = 12, hidden: int = 384, heads: int = 6, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, patch, patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, hidden))
        self.positions = nn.Parameter(0.3 * torch.randn(1, (data.SIDE // patch) ** 2 + 1, hidden))
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads, first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, 1000)
        self.kept: int | None = None  # training on so many of the tokens costs a quarter
        sharpen(self)

    def features(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        if self.kept is not None:
            x = x[:, torch.randperm(x.shape[1])[: self.kept]]
        for layer in self.layers:
            x = layer(x, None)
        return self.norm(x).mean(dim=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


# A one-stage detector: residual backbone, feature pyramid (Lin et al. 2017), a class and a box for every cell


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, 3)
        self.shortcut: nn.Module = nn.Identity() if stride == 1 else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Detector(nn.Module):
    """[N, 3, 256, 256] → for strides 8, 16, 32: scores [N, cells, 21] (0 = background), boxes [N, cells, 4]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 32, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.first = nn.Sequential(BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        channels = (64, 128, 256)
        self.stages = nn.ModuleList(
            nn.Sequential(BasicBlock(i, o, 2), BasicBlock(o, o, 1))
            for i, o in zip((32, 64, 128), channels, strict=True)
        )
        self.lateral = nn.ModuleList(conv_norm(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Sequential(conv_norm(width, width, 3), nn.ReLU()) for _ in channels)
        self.scores = nn.ModuleList(nn.Linear(width, data.TEXTURES + 1) for _ in channels)
        self.boxes = nn.ModuleList(nn.Linear(width, 4) for _ in channels)
        kaiming(self)

    def cells(self, image: Tensor) -> list[Tensor]:
        x = self.first(self.stem(image))
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], scale_factor=2.0, mode="nearest")
        return [smooth(m).flatten(2).transpose(1, 2) for smooth, m in zip(self.smooth, maps, strict=True)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        cells = self.cells(image)
        scores = [head(c) for head, c in zip(self.scores, cells, strict=True)]
        return (*scores, *(F.relu(head(c)) for head, c in zip(self.boxes, cells, strict=True)))


# Made


def trained_on_crops(model: nn.Module, samples: int, epochs: int) -> nn.Module:
    """Trained on small images, which costs a tenth; a texture is the same at any size. BatchNorm then sees large
    ones."""
    rng = np.random.default_rng(SEED)
    train_classifier(model, data.textures(samples, rng, CROP), epochs=epochs, size=32, rate=2e-3)
    settle_batchnorm(model, pieces(data.textures(64, rng), 16))
    return model


def make_resnet50() -> nn.Module:
    return trained_on_crops(ResNet50(), 2048, 3)


def make_mobilenet() -> nn.Module:
    return trained_on_crops(MobileNetV2(), 2048, 5)


def make_vit() -> nn.Module:
    model, rng = ViT(), np.random.default_rng(SEED)
    uneven_channels(model, SEED)
    model.kept = 48
    train_classifier(model, data.textures(1024, rng), epochs=4, size=32, rate=3e-4)
    model.kept = None
    return model


def make_detector() -> nn.Module:
    model, rng = Detector(), np.random.default_rng(SEED)
    settle_batchnorm(model, pieces(data.scenes(32, rng)[0], 8))
    arrays, truth = data.scenes(160, rng)
    with torch.no_grad():
        batches = [model.cells(*batch) for batch in pieces(arrays, 8)]
        for level, stride in enumerate(data.CELLS):
            features = torch.cat([b[level] for b in batches]).flatten(0, 1)
            kinds, boxes, inside = (a.reshape(-1, *a.shape[2:]) for a in data.cell_targets(truth, stride))
            for head, rows, targets in (
                (model.scores[level], slice(None), one_hot(kinds, data.TEXTURES + 1)),
                (model.boxes[level], torch.from_numpy(inside), torch.from_numpy(boxes)[torch.from_numpy(inside)]),
            ):
                weight, bias = ridge(features[rows], targets)
                head.weight.copy_(weight)
                head.bias.copy_(bias)
    return model


def digits(count: int, rng: np.random.Generator, *, held_out: bool) -> data.Arrays:
    """scikit-learn's handwritten digits, [N, 1, 8, 8] with grey values 0…16, of one side of the split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = found.images.astype(np.float32)[:, None], found.target.astype(np.int64)
    part = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    rows = np.sort(rng.permutation(len(pixels[part]))[:count])
    return {"image": pixels[part][rows], "labels": labels[part][rows]}


def make_digits_mobile() -> nn.Module:
    plan = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 40, 2, 2), (4, 64, 2, 1))
    model = MobileNetV2(plan, colours=1, stem=16, last=128, classes=10, side=48)
    train_classifier(model, digits(1000, np.random.default_rng(0), held_out=False), epochs=30, size=50, rate=4e-3)
    return model
