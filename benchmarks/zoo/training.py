"""What makes seeded networks behave as trained ones: BatchNorm that saw data, a fitted head, uneven channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray[Any, Any]

RIDGE = 0.05  # relative to the mean variance of a feature
LOGIT = 6.0  # the fitted logit of the right class lies so far above the others'


def pieces(arrays: dict[str, Array], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The arrays in batches, without the labels, in their order."""
    kept = {n: a for n, a in arrays.items() if n != "labels"}
    count = len(next(iter(kept.values())))
    for start in range(0, count, size):
        yield tuple(torch.from_numpy(a[start : start + size]) for a in kept.values())


def settle_batchnorm(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> None:
    """BatchNorm's statistics from these batches, the plain average over them; the model is in eval mode then."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    model.eval()


def uneven_channels(model: nn.Module, seed: int) -> None:
    """Gains as training leaves them: a LayerNorm has few channels far above the rest (Dettmers et al. 2022,
    "LLM.int8()"), a BatchNorm a spread over its channels."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            gain = module.weight.data
            gain.mul_(torch.exp(0.3 * torch.randn(gain.shape, generator=generator)))
            if isinstance(module, nn.LayerNorm):
                loud = torch.rand(gain.shape, generator=generator) < 0.01
                gain[loud] *= 4


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [k, d], bias [k]) of the linear map from features [n, d] to targets [n, k], with an L2 penalty."""
    x, y = features.double(), targets.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty, centred.T @ (y - mean_y) / len(x)).T
    return weight.float(), (mean_y - weight @ mean_x).float()


def one_hot(labels: Array, classes: int) -> Tensor:
    return LOGIT * nn.functional.one_hot(torch.from_numpy(labels), classes).float()


def fit_head(model: Any, arrays: dict[str, Array], size: int = 16) -> None:
    """Fit `model.head` (linear, on `model.features`) to the labels; the rest stays as it was seeded."""
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(*batch) for batch in pieces(arrays, size)])
        weight, bias = ridge(features, one_hot(arrays["labels"], model.head.out_features))
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)


def train_classifier(model: nn.Module, arrays: dict[str, Array], *, epochs: int, size: int, rate: float) -> None:
    """AdamW with a one-cycle schedule on the cross entropy of the labels."""
    labels = torch.from_numpy(arrays["labels"])
    inputs = [torch.from_numpy(a) for n, a in arrays.items() if n != "labels"]
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(labels) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for i in range(len(labels) // size):
            rows = order[i * size : (i + 1) * size]
            loss = nn.functional.cross_entropy(model(*(x[rows] for x in inputs)), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
