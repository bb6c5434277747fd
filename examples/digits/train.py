"""Trains the demo's model: a small residual CNN on scikit-learn's bundled handwritten digits.

    pip install torch scikit-learn onnx numpy
    python examples/digits/train.py            # about a minute on two cores; writes beside this file

Writes `model.onnx` as an exporter leaves it (BatchNorm still apart from the convolutions, dynamic batch axis),
`calibration.npz` (samples of the training set) and `validation.npz` (samples the model never saw, with `labels`).
The images go in as scikit-learn has them, 8x8 with grey values 0…16; scaling and resizing are part of the graph.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 20260
HELD_OUT = 797
CALIBRATION = 256
SIDE = 28  # the resolution the network works at


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(self.first(x))))


class DigitsNet(nn.Module):
    """Grey images of shape (N, 1, 8, 8), values 0…16, to logits of shape (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(1, 16),
            ConvBlock(16, 32),
            ResidualBlock(32),
            ResidualBlock(32),
            ConvBlock(32, 64, stride=2),
            ResidualBlock(64),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(image / 16.0, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.body(x).mean(dim=(2, 3))
        return self.head(self.dropout(x))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scalings and shifts; the data set is small."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(0.2), 1 + uniform(0.12)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = scale * angle.cos(), -scale * angle.sin()
    matrix[:, 1, 0], matrix[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    matrix[:, 0, 2], matrix[:, 1, 2] = uniform(0.15), uniform(0.15)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose largest logit is the label's."""
    model.eval()
    with torch.no_grad():
        return 100.0 * (model(images).argmax(1) == labels).float().mean().item()


def train(images: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(SEED)
    model = DigitsNet()
    batch = 64
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for i in range(len(images) // batch):
            rows = order[i * batch : (i + 1) * batch]
            logits = model(augment(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4 or epoch == epochs - 1:
            print(
                f"epoch {epoch + 1:3d}  loss {loss.item():.3f}  held-out accuracy {accuracy(model, *held_out):.2f} %",
                flush=True,
            )
    return model.eval()


def export(model: nn.Module, example: Tensor, path: Path) -> None:
    """Without the exporter's own folding and fusing: BatchNorm and the copies of shared weights stay in the graph."""
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=["image"],
        output_names=["logits"],
        opset_version=17,
        dynamo=False,  # the other exporter either folds BatchNorm or writes its biases as computed tensors
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    data = load_digits()
    pixels = data.images.astype(np.float32)[:, None]
    # In the data set's own order: the later digits are mostly by other writers, which a shuffled split would hide.
    x, x_val = pixels[:-HELD_OUT], pixels[-HELD_OUT:]
    y, y_val = data.target[:-HELD_OUT], data.target[-HELD_OUT:]
    held_out = (torch.from_numpy(x_val), torch.from_numpy(y_val))
    model = train(torch.from_numpy(x), torch.from_numpy(y), held_out, args.epochs)
    args.out.mkdir(parents=True, exist_ok=True)
    export(model, torch.from_numpy(x[:8]), args.out / "model.onnx")
    np.savez_compressed(args.out / "calibration.npz", image=x[:CALIBRATION])
    np.savez_compressed(args.out / "validation.npz", image=x_val, labels=y_val.astype(np.int64))
    graph = onnx.load(args.out / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    parameters = sum(p.numel() for p in model.parameters())
    seconds = time.monotonic() - started
    print(f"{parameters} parameters, {accuracy(model, *held_out):.2f} % on {HELD_OUT} held-out digits, {seconds:.0f} s")
    for name in ("model.onnx", "calibration.npz", "validation.npz"):
        print(f"{name}: {(args.out / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
