"""Networks that only the GPU is measured with: ViT-B/16, EfficientNet-B0, ConvNeXt-T, and a detector as DETR is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.vision import ResNet50, conv_norm


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


class MBConv(nn.Module):
    """Expanded, filtered per channel, weighted by squeeze-and-excitation, projected."""

    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide, squeezed = inputs * expand, max(1, inputs // 4)
        self.wide = nn.Sequential(conv_norm(inputs, wide, 1), nn.SiLU()) if expand > 1 else nn.Identity()
        self.depthwise = nn.Sequential(conv_norm(wide, wide, kernel, stride, groups=wide), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(wide, squeezed, 1), nn.Conv2d(squeezed, wide, 1)
        self.narrow = conv_norm(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.wide(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.narrow(y * gate)
        return x + y if self.adds else y


class EfficientNet(nn.Module):
    """EfficientNet-B0 (Tan and Le 2019): 5.3 M parameters. Rows: expansion, channels, repeats, stride, kernel."""

    PLAN = (
        *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
        *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
    )

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv_norm(3, 32, 3, 2), nn.SiLU()]
        inputs = 32
        for expand, channels, repeats, stride, kernel in self.PLAN:
            for i in range(repeats):
                blocks.append(MBConv(inputs, channels, expand, kernel, stride if i == 0 else 1))
                inputs = channels
        self.body = nn.Sequential(*blocks, conv_norm(inputs, 1280, 1), nn.SiLU())
        self.head = nn.Linear(1280, 1000)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(image).mean((2, 3)))
        return logits


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt-T (Liu et al. 2022): 29 M parameters."""

    def __init__(self, widths: tuple[int, ...] = (96, 192, 384, 768), depths: tuple[int, ...] = (3, 3, 9, 3)) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6)]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i:
                stages += [ChannelNorm(widths[i - 1], eps=1e-6), nn.Conv2d(widths[i - 1], width, 2, 2)]
            stages += [ConvNeXtBlock(width) for _ in range(depth)]
        self.body = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], 1000)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.body(image).mean((2, 3))))
        return logits


class Attend(nn.Module):
    """Queries of `x`, keys and values of `memory`, by torch's own function."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(memory)), self.split(self.value(memory))
        mixed: Tensor = self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return mixed


class DetrLayer(nn.Module):
    """Normalized after each part; `across`: attends to the image as well, as a decoder's layer does."""

    def __init__(self, hidden: int, heads: int, across: bool) -> None:
        super().__init__()
        self.within, self.across = Attend(hidden, heads), Attend(hidden, heads) if across else None
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3 if across else 2))
        self.wide, self.narrow = nn.Linear(hidden, 8 * hidden), nn.Linear(8 * hidden, hidden)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.norms[0](x + self.within(x, x))
        if self.across is not None:
            x = self.norms[1](x + self.across(x, memory))
        found: Tensor = self.norms[-1](x + self.narrow(F.relu(self.wide(x))))
        return found


class Detr(nn.Module):
    """As DETR (Carion et al. 2020): ResNet-50's features, six layers of encoder and of decoder, 100 queries answered by
    classes and boxes. Positions are learnt, for images of one size: 512 × 512."""

    def __init__(self, hidden: int = 256, heads: int = 8, layers: int = 6, queries: int = 100, side: int = 16) -> None:
        super().__init__()
        self.backbone = ResNet50()
        self.backbone.head = nn.Identity()
        self.project = nn.Conv2d(2048, hidden, 1)
        self.positions = nn.Parameter(torch.randn(1, side * side, hidden) * 0.1)
        self.queries = nn.Parameter(torch.randn(1, queries, hidden) * 0.5)
        self.encoder = nn.ModuleList(DetrLayer(hidden, heads, across=False) for _ in range(layers))
        self.decoder = nn.ModuleList(DetrLayer(hidden, heads, across=True) for _ in range(layers))
        self.classes = nn.Linear(hidden, 92)
        self.boxes = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.corners = nn.Linear(hidden, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.body(self.backbone.stem(image))
        memory = self.project(features).flatten(2).transpose(1, 2) + self.positions
        for layer in self.encoder:
            memory = layer(memory, memory)
        answers = self.queries.expand(image.shape[0], -1, -1)
        for layer in self.decoder:
            answers = layer(answers, memory)
        return self.classes(answers), torch.sigmoid(self.corners(self.boxes(answers)))
