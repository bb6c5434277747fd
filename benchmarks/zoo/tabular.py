"""An LSTM over frames, a GRU with two heads, and a recommender: embeddings of ids and an MLP."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from zoo import data
from zoo.training import LOGIT, fit_head, ridge, train_classifier

SEED = 20_261


class FrameClassifier(nn.Module):
    def __init__(self, inputs: int = 128, hidden: int = 512, classes: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:  # the default lets the signal fade
                nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)

    def features(self, frames: Tensor) -> Tensor:
        return self.lstm(frames)[0][:, -1]

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))


class TwoHeads(nn.Module):
    """frames [N, 64, 128] → scores [N, 16] of the rhythm, and strength [N, 1]: two heads on one GRU."""

    def __init__(self, inputs: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, num_layers=1, batch_first=True)
        self.scores, self.strength = nn.Linear(hidden, data.RHYTHMS), nn.Linear(hidden, 1)
        for name, parameter in self.gru.named_parameters():
            if "weight" in name:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)

    def features(self, frames: Tensor) -> Tensor:
        return self.gru(frames)[0].mean(dim=1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(frames)
        return self.scores(x), self.strength(x)


class Recommender(nn.Module):
    """Five ids [N] and dense features [N, 13] → logits [N, 2], in the manner of Wide & Deep (Cheng et al. 2016)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in data.CARDINALITY.values())
        self.dense = nn.Sequential(nn.Linear(data.DENSE, 128), nn.ReLU(), nn.Linear(128, width), nn.ReLU())
        sizes = (width * (len(data.CARDINALITY) + 1), 1024, 512, 256)
        layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.deep = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor, shop: Tensor, city: Tensor, hour: Tensor, dense: Tensor) -> Tensor:
        ids = (user, item, shop, city, hour)
        parts = [table(i) for table, i in zip(self.tables, ids, strict=True)]
        return self.deep(torch.cat([*parts, self.dense(dense)], dim=-1))


def frames(count: int, rng: np.random.Generator) -> data.Arrays:
    return {"frames": data.beats(count, rng)["frames"]}


def make_lstm() -> nn.Module:
    model = FrameClassifier()
    fit_head(model, data.rhythms(2000, np.random.default_rng(SEED)), 64)
    return model.eval()


def make_gru() -> nn.Module:
    model = TwoHeads().eval()
    known = data.beats(2000, np.random.default_rng(SEED))
    with torch.no_grad():
        features = model.features(torch.from_numpy(known["frames"]))
        for head, targets in ((model.scores, LOGIT * known["kind"]), (model.strength, known["strength"])):
            weight, bias = ridge(features, torch.from_numpy(targets))
            head.weight.copy_(weight)
            head.bias.copy_(bias)
    return model


def make_recommender() -> nn.Module:
    model = Recommender()
    train_classifier(model, data.clicks(60_000, np.random.default_rng(SEED)), epochs=3, size=256, rate=2e-3)
    return model
