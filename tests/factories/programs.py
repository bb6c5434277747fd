"""Exported programs made by code, seeded, as the stage `export` leaves them: `program.pt2` and `interface.json`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.artifacts import PROGRAM_FILE
from workers.graph.exported_program import quiet
from workers.graph.interface import Interface
from workers.kernel import TensorSpec

if TYPE_CHECKING:
    from torch import nn

Dims = Mapping[str, tuple[int, int]]  # least and most


def cnn() -> nn.Module:
    """Convolutions with batch norms, one with a bias and one whose output is read twice; image [batch, 3, 16, 16]."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            self.conv = nn.Conv2d(16, 16, 3, padding=1)
            self.norm2 = nn.BatchNorm2d(16)
            self.fc = nn.Linear(16, 10)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.stem(image)))
            x = torch.relu(self.norm2(self.conv(x)) + x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    for norm in (net.norm, net.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def convnext(width: int = 64, blocks: int = 3) -> nn.Module:
    """As ConvNeXt: depthwise convolutions among matrix products, more of these than of those; image [batch, 3, 32, 32]
    to ten scores."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = nn.LayerNorm(width)
            self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + self.narrow(nn.functional.gelu(self.wide(y))).permute(0, 3, 1, 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 10)
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks(self.stem(image)).mean((2, 3)))

    torch.manual_seed(0)
    return Net().eval()


def transformer() -> nn.Module:
    """Two layers of attention under a mask: ids and mask [batch, time], int64; two outputs, of which one is the mask as
    it came."""
    import torch
    from torch import nn

    width, heads = 32, 4

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            batch, time, _ = x.shape
            parts = self.qkv(self.norm(x)).view(batch, time, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            seen = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
            x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 4)
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, bias = self.embed(ids), (1.0 - mask[:, None, None, :].to(torch.float32)) * -1e4
            for layer in self.layers:
                x = layer(x, bias)
            return self.head(x.mean(1)).to(torch.float32), mask

    torch.manual_seed(0)
    return Net().eval()


def scores_of(net: nn.Module) -> nn.Module:
    """The transformer without the mask among its outputs."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.net(ids, mask)[0]

    return Net().eval()


def unlowered() -> nn.Module:
    """A program that torch exports and Inductor has no code for."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_sparse().to_dense() + 1

    return Net().eval()


def brittle() -> nn.Module:
    """Separable convolutions whose channels are of unlike size, so that one scale for all of them loses the small ones;
    image [batch, 1, 8, 8]."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)]
    net = nn.Sequential(
        *(part for layer in layers for part in (layer, nn.ReLU())),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    with torch.no_grad():
        sizes = torch.logspace(0, 1.6, 8)
        for layer in layers[:2]:
            layer.weight *= sizes.reshape(-1, 1, 1, 1) if layer.groups == 1 else 1
            layer.bias.zero_() if layer.groups == 1 else None
        layers[2].weight /= sizes.reshape(1, -1, 1, 1)
    return net.eval()


def convolutions(*, unlike: bool) -> nn.Module:
    """Large enough that int8 is faster; image [batch, 3, 16, 16] to an embedding [batch, 16] whose mean is about 0.
    `unlike`: with channels of sizes up to a thousand times of others between all convolutions, as whose function
    nothing changes: half of the work kept in float32 leaves the other half as wrong."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 32, 3, padding=1), *(nn.Conv2d(a, 64, 3, padding=1) for a in (32, 64, 64))]
    head = nn.Linear(64, 16)
    layers = [part for conv in convs for part in (conv, nn.ReLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    with torch.no_grad():
        head.bias -= net(torch.randn(64, 3, 16, 16)).mean(0)
        for writer, reader in pairwise(convs) if unlike else ():
            gains = torch.logspace(0, 3, writer.out_channels)[torch.randperm(writer.out_channels)]
            writer.weight *= gains.reshape(-1, 1, 1, 1)
            writer.bias *= gains
            reader.weight /= gains.reshape(1, -1, 1, 1)
    return net.eval()


def separable() -> nn.Module:
    """As MobileNetV2 has them: expansion, depthwise convolution, projection without an activation, and the sum; batch
    norms whose channels are of unlike size. Image [batch, 1, 8, 8] to five scores."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.expand, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
            self.deep, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
            self.project, self.norm3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm0(self.stem(input)))
            y = torch.relu(self.norm2(self.deep(torch.relu(self.norm1(self.expand(x))))))
            return self.head((x + self.norm3(self.project(y))).mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    sizes = torch.logspace(-1, 1, 16)
    with torch.no_grad():
        for norm in (net.norm0, net.norm1, net.norm2, net.norm3):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.3, 1.0)
            norm.bias.normal_(std=0.3)
        net.norm1.weight *= sizes
        net.norm1.bias *= sizes
        net.deep.weight /= sizes.reshape(-1, 1, 1, 1)
        net.head.weight *= 5
    return net.eval()


def linear() -> nn.Module:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def save(
    net: nn.Module, path: Path, inputs: Mapping[str, tuple[str, tuple[int | str, ...]]], dims: Dims | None = None
) -> Path:
    """Export to the file `path`. `inputs`: dtype and shape by name; a size that is a name is one of `dims`."""
    import torch

    known = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in (dims or {}).items()}
    args = tuple(
        torch.ones([d if isinstance(d, int) else 3 for d in shape], dtype=getattr(torch, dtype))
        for dtype, shape in inputs.values()
    )
    shapes = tuple({i: known[d] for i, d in enumerate(shape) if isinstance(d, str)} for _, shape in inputs.values())
    with quiet(), torch.no_grad():
        torch.export.save(torch.export.export(net, args, dynamic_shapes=shapes if known else None), str(path))
    return path


def folder(
    net: nn.Module,
    root: Path,
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]],
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]],
    dims: Dims | None = None,
) -> Path:
    root.mkdir(parents=True)
    save(net, root / PROGRAM_FILE, inputs, dims)
    Interface(*(tuple(TensorSpec(n, t, s) for n, (t, s) in side.items()) for side in (inputs, outputs))).write(root)
    return root


def answers(net: nn.Module, feeds: Mapping[str, Any]) -> list[Any]:
    """What torch itself says, eagerly and in float32."""
    import torch

    with torch.no_grad():
        found = net(*(torch.from_numpy(a) for a in feeds.values()))
    return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]
