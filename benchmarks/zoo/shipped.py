"""Two models with the weights that their users run: a recogniser of text lines and a detector of voices, out of the
wheels that ship them, on drawn lines and synthetic speech.

PP-OCRv4's recogniser (PaddlePaddle, Apache-2.0) out of `rapidocr-onnxruntime`; Silero VAD (MIT) out of `silero-vad`.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zoo import data
from zoo.language import english
from zoo.wheels import unpacked, wheel

Array = np.ndarray[Any, Any]

OCR = "rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
VAD = "silero-vad==6.2.3", "silero_vad/data/silero_vad.onnx"
PILLOW = "pillow==13.0.0"  # draws the lines

HEIGHT, WIDTH = 48, 320  # of a line, as the recogniser is fed
RATE = 16_000
CHUNK, CONTEXT = 512, 64  # samples of sound that a call looks at, and those before them
STATE = (2, 1, 128)


def make_ocr(folder: Path) -> bytes:
    return _read(OCR, folder)


def make_vad(folder: Path) -> bytes:
    return _read(VAD, folder)


def _read(place: tuple[str, str], folder: Path) -> bytes:
    with wheel(place[0], folder) as archive:
        return archive.read(place[1])


# Lines of text


def lines(count: int, rng: np.random.Generator, *, folder: Path) -> data.Arrays:
    """`x` [N, 3, 48, 320]: parts of English sentences, dark on light or light on dark, a little noisy."""
    site = str(unpacked(PILLOW, folder))
    if site not in sys.path:
        sys.path.append(site)
    from PIL import Image, ImageDraw, ImageFont

    pool = english()
    x = np.zeros((count, 3, HEIGHT, WIDTH), np.float32)
    for i in range(count):
        words = pool[rng.integers(0, len(pool))].split()
        start = int(rng.integers(0, max(1, len(words) - 3)))
        text = " ".join(words[start : start + 4])[:22]
        font = ImageFont.load_default(size=int(rng.integers(22, 31)))
        light, dark = int(rng.integers(200, 256)), int(rng.integers(0, 70))
        paper, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
        canvas = Image.new("L", (WIDTH, HEIGHT), paper)
        at = float(rng.uniform(2, 10)), float(rng.uniform(4, 10))
        ImageDraw.Draw(canvas).text(at, text, fill=ink, font=font)
        pixels = np.asarray(canvas, np.float32) + rng.normal(0, rng.uniform(1, 8), (HEIGHT, WIDTH))
        x[i] = np.clip(pixels, 0, 255) / 127.5 - 1
    return {"x": x}


# Voices


def speech(seconds: float, rng: np.random.Generator) -> Array:
    """Sound at 16 kHz: syllables (harmonics of a gliding pitch under three formants) in phrases, between pauses, over
    noise."""
    total = int(seconds * RATE)
    sound, at = np.zeros(total), int(rng.uniform(0.1, 0.6) * RATE)
    while at < total:
        for _ in range(rng.integers(2, 7)):
            length = int(rng.uniform(0.1, 0.3) * RATE)
            part = _syllable(length, rng)[: max(0, total - at)]
            sound[at : at + len(part)] += part
            at += int(length * rng.uniform(0.9, 1.3))
        at += int(rng.uniform(0.3, 1.2) * RATE)
    return sound * rng.uniform(0.1, 0.4) + rng.normal(0, 10 ** rng.uniform(-4, -2), total)


def _syllable(length: int, rng: np.random.Generator) -> Array:
    time = np.arange(length) / RATE
    pitch = rng.uniform(90, 240) * (1 + rng.uniform(-0.3, 0.3) * time / time[-1])
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = rng.uniform((300, 900, 2200), (850, 2100, 3200))
    sound = np.zeros(length)
    for k in range(1, int(4000 / pitch.mean())):
        envelope = sum(1 / (1 + ((k * pitch - f) / 90) ** 2) for f in formants)
        sound += envelope / k**0.5 * np.sin(k * phase)
    return sound * np.hanning(length) / (np.abs(sound).max() + 1e-9)


def chunks(count: int, rng: np.random.Generator, *, folder: Path) -> data.Arrays:
    """Calls as a stream makes them: `input` [N, 576], the `state` [2, N, 128] that the calls before left, and the rate
    `sr`, which is the same for all."""
    session = _session(folder)
    sr, found, states = np.asarray(RATE, np.int64), [], []
    while len(found) < count:
        sound = speech(4.0, rng).astype(np.float32)
        state, before = np.zeros(STATE, np.float32), np.zeros(CONTEXT, np.float32)
        for start in range(0, len(sound) - CHUNK, CHUNK):
            piece = np.concatenate([before, sound[start : start + CHUNK]])
            if rng.random() < 0.25:
                found.append(piece)
                states.append(state)
            state = session.run(["stateN"], {"input": piece[None], "state": state, "sr": sr})[0]
            before = piece[-CONTEXT:]
    return {"input": np.stack(found[:count]), "state": np.concatenate(states[:count], axis=1), "sr": sr}


@functools.cache
def _session(folder: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(make_vad(folder), options, providers=["CPUExecutionProvider"])
