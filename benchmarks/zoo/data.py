"""Inputs with structure: textures on natural-like images, word pieces by Zipf's law, frames, clicks. All from a seed.

Arrays are batch first; a classification set carries `labels` (int64, one per sample).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

TEXTURES = 20
TOPICS = 16
RHYTHMS = 16
VOCABULARY = 30_522
SIDE = 224
DETECT_SIDE = 256
MASK_SIDE = 128
CELLS = (8, 16, 32)  # stride of the detector's levels, in pixels
CARDINALITY = {"user": 20_000, "item": 10_000, "shop": 1_000, "city": 200, "hour": 24}
DENSE = 13


# Images


def natural(rng: np.random.Generator, side: int) -> Array:
    """[3, side, side] with the 1/f spectrum of natural images, each of its own brightness and contrast."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf  # no constant part
    grey = rng.standard_normal((1, side, side)) + 0.3 * rng.standard_normal((3, side, side))
    field = np.fft.irfft2(np.fft.rfft2(grey) / frequency, s=(side, side))
    field /= field.std(axis=(1, 2), keepdims=True)
    return field * rng.uniform(0.5, 1.3) + rng.uniform(-0.7, 0.7)


def texture(kind: int, rng: np.random.Generator, height: int, width: int) -> Array:
    """[3, height, width]: a tinted grating; orientation, pitch and tint tell the kind, phase and strength do not."""
    fixed = np.random.default_rng(kind)
    tint = fixed.standard_normal(3)
    angle = math.pi * kind / TEXTURES + rng.normal(0, 0.05)
    pitch = (6.0, 9.0, 13.0, 19.0)[kind % 4] * rng.uniform(0.93, 1.07)
    y, x = np.mgrid[:height, :width]
    wave = np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / pitch + rng.uniform(0, 2 * math.pi))
    return (tint / np.linalg.norm(tint) * 1.7)[:, None, None] * wave * rng.uniform(0.6, 1.2)


def textures(count: int, rng: np.random.Generator, side: int = SIDE) -> Arrays:
    """Natural-like images under one of 20 textures: `image` [N, 3, side, side] and its label."""
    labels = rng.integers(0, TEXTURES, count)
    image = np.empty((count, 3, side, side), np.float32)
    for i, kind in enumerate(labels):
        image[i] = 0.7 * natural(rng, side) + texture(int(kind), rng, side, side)
    return {"image": image, "labels": labels.astype(np.int64)}


def scenes(count: int, rng: np.random.Generator) -> tuple[Arrays, list[Array]]:
    """Images with one to three textured rectangles, and the truth per object: rows of (kind, left, top, right,
    bottom) in pixels."""
    image = np.empty((count, 3, DETECT_SIDE, DETECT_SIDE), np.float32)
    truth = []
    for i in range(count):
        canvas = 0.7 * natural(rng, DETECT_SIDE)
        objects = []
        for _ in range(rng.integers(1, 4)):
            kind = int(rng.integers(0, TEXTURES))
            width, height = (int(v) for v in rng.integers(40, 160, 2))
            left, top = int(rng.integers(0, DETECT_SIDE - width)), int(rng.integers(0, DETECT_SIDE - height))
            canvas[:, top : top + height, left : left + width] += texture(kind, rng, height, width)
            objects.append((kind, left, top, left + width, top + height))
        image[i] = canvas
        truth.append(np.array(objects, np.float64))
    return {"image": image}, truth


def masks(count: int, rng: np.random.Generator, side: int = MASK_SIDE) -> Arrays:
    """Images with one to three textured discs: `image` [N, 3, side, side], and `labels` [N, side, side]: the kind of
    the texture at every pixel, 0 = background."""
    image = np.empty((count, 3, side, side), np.float32)
    labels = np.zeros((count, side, side), np.int64)
    y, x = np.mgrid[:side, :side]
    for i in range(count):
        canvas = 0.7 * natural(rng, side)
        for _ in range(rng.integers(1, 4)):
            kind, radius = int(rng.integers(0, TEXTURES)), rng.uniform(0.12, 0.3) * side
            inside = np.hypot(y - rng.uniform(0, side), x - rng.uniform(0, side)) < radius
            canvas += texture(kind, rng, side, side) * (inside & (labels[i] == 0))
            labels[i][inside & (labels[i] == 0)] = kind + 1
        image[i] = canvas
    return {"image": image, "labels": labels}


def cell_targets(truth: list[Array], stride: int) -> tuple[Array, Array, Array]:
    """For each cell of a level: class [N, cells] (0 = background), box as (l, t, r, b) distances in strides
    [N, cells, 4], and whether there is an object [N, cells]."""
    side = DETECT_SIDE // stride
    centre = (np.arange(side) + 0.5) * stride
    y, x = np.meshgrid(centre, centre, indexing="ij")
    kinds = np.zeros((len(truth), side * side), np.int64)
    boxes = np.zeros((len(truth), side * side, 4), np.float32)
    for i, objects in enumerate(truth):
        for kind, left, top, right, bottom in objects:
            distances = np.stack([x - left, y - top, right - x, bottom - y], axis=-1).reshape(-1, 4) / stride
            inside = (distances > 0).all(axis=1)
            kinds[i, inside] = int(kind) + 1
            boxes[i, inside] = distances[inside]
    return kinds, boxes, kinds > 0


# Word pieces


def topics(count: int, rng: np.random.Generator, tokens: int = 128) -> Arrays:
    """Documents of 24 to `tokens` word pieces between [CLS] and [SEP], padded; three in ten words are the topic's."""
    labels = rng.integers(0, TOPICS, count)
    ids = np.zeros((count, tokens), np.int64)
    mask = np.zeros((count, tokens), np.int64)
    for i, length in enumerate(rng.integers(24, tokens + 1, count)):
        words = 999 + np.minimum(rng.zipf(1.2, length - 2), VOCABULARY - 1000)
        own = rng.random(length - 2) < 0.3
        words[own] = 2000 + 40 * labels[i] + rng.integers(0, 40, int(own.sum()))
        ids[i, :length] = [101, *words, 102]
        mask[i, :length] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "labels": labels.astype(np.int64),
    }


def prompts(count: int, rng: np.random.Generator) -> Arrays:
    """`input_ids` [N, 64]: tokens by Zipf's law over GPT-2's vocabulary."""
    return {"input_ids": np.minimum(rng.zipf(1.2, (count, 64)), 50_256).astype(np.int64)}


# Series and tables


def rhythms(count: int, rng: np.random.Generator) -> Arrays:
    """`frames` [N, 64, 128]: a first-order autoregression under a pattern that beats in one of 16 rhythms."""
    fixed = np.random.default_rng(1)
    patterns = fixed.standard_normal((RHYTHMS, 128))
    labels = rng.integers(0, RHYTHMS, count)
    noise = rng.standard_normal((count, 64, 128))
    frames = np.empty_like(noise)
    frames[:, 0] = noise[:, 0]
    for t in range(1, 64):
        frames[:, t] = 0.9 * frames[:, t - 1] + math.sqrt(1 - 0.9**2) * noise[:, t]
    phase = rng.uniform(0, 2 * math.pi, count)
    beat = 0.7 + np.sin(np.arange(64)[None, :] * (0.1 + 0.05 * labels[:, None]) + phase[:, None])
    frames += 0.6 * beat[:, :, None] * patterns[labels][:, None, :]
    return {"frames": frames.astype(np.float32), "labels": labels.astype(np.int64)}


def beats(count: int, rng: np.random.Generator) -> Arrays:
    """Frames as of `rhythms`, each sample with a strength of its own: the truth of two outputs, `kind` [N, 16]
    (one-hot) and `strength` [N, 1]."""
    found = rhythms(count, rng)
    strength = rng.uniform(0.5, 1.5, (count, 1)).astype(np.float32)
    frames = found["frames"] * strength[:, :, None]
    return {"frames": frames, "kind": np.eye(RHYTHMS, dtype=np.float32)[found["labels"]], "strength": strength}


def clicks(count: int, rng: np.random.Generator) -> Arrays:
    """Five ids [N] by Zipf's law, `dense` [N, 13], and whether it was clicked (label 0 or 1), by hidden factors."""
    fixed = np.random.default_rng(2)
    ids = {n: np.minimum(rng.zipf(1.15, count) - 1, size - 1).astype(np.int64) for n, size in CARDINALITY.items()}
    ids["hour"] = rng.integers(0, CARDINALITY["hour"], count)
    dense = rng.standard_normal((count, DENSE)).astype(np.float32)
    score = 0.8 * dense @ fixed.standard_normal(DENSE) / math.sqrt(DENSE)
    factors = {n: fixed.standard_normal((size, 8)) for n, size in CARDINALITY.items()}
    for left, right in (("user", "item"), ("shop", "hour"), ("item", "city")):
        score += (factors[left][ids[left]] * factors[right][ids[right]]).sum(axis=1) / 2
    labels = (score + 0.3 * rng.standard_normal(count) > 0).astype(np.int64)
    return {**ids, "dense": dense, "labels": labels}
