"""What a model uploaded as a program (`.pt2`) gains over the same model uploaded as ONNX, on a CPU.

    python benchmarks/programs.py                          # resnet50, mobilenet, vit, encoder
    python benchmarks/programs.py --models mobilenet,encoder --budget 400   # about 14 minutes on two slow cores

A job of the program alone, which has Inductor's engines beside those of its ONNX form, without int8: all of them
measured in full, side by side, by the job itself. Of each precision: the fastest of Inductor's to the fastest of the
others, by p50. Seeded weights: nothing is said of accuracy. What `workers/backends/inductor/gains.py` tells owners of
ONNX files comes from here.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import CannotMeasure, deployment, execute, parser, say, scratch, table
from torch import nn
from zoo import language, vision

from anneal_client import AnnealError, Client

Json = dict[str, Any]
Arrays = dict[str, np.ndarray[Any, Any]]
BATCHES = (1, 8)
PRECISIONS = ("fp32", "bf16")  # the second where the processor has it
OURS = "inductor"
_SEED, _SAMPLES, _TOKENS = 20_261, 64, 64


@dataclass(frozen=True)
class Program:
    """`samples`: so many, by name."""

    label: str
    module: Callable[[], nn.Module]
    samples: Callable[[int, np.random.Generator], Arrays]


def _images(count: int, rng: np.random.Generator) -> Arrays:
    return {"image": rng.normal(size=(count, 3, 224, 224)).astype(np.float32)}


def _sentences(count: int, rng: np.random.Generator) -> Arrays:
    ids = rng.integers(0, 20_000, (count, _TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


PROGRAMS = {
    "resnet50": Program("ResNet-50", vision.ResNet50, _images),
    "mobilenet": Program("MobileNetV2", vision.MobileNetV2, _images),
    "vit": Program("ViT-S/16", vision.ViT, _images),
    "encoder": Program(f"MiniLM-size encoder, {_TOKENS} tokens", language.SentenceEncoder, _sentences),
}


def written(program: Program, folder: Path) -> tuple[Path, Path]:
    """The program as `torch.export.save` writes it, any batch size up to 64, and its data."""
    torch.manual_seed(_SEED)
    samples = program.samples(_SAMPLES, np.random.default_rng(_SEED))
    batch = torch.export.Dim("batch", min=1, max=64)
    model, data = folder / "model.pt2", folder / "data.npz"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = tuple(torch.from_numpy(a[:2]) for a in samples.values())
        axes = tuple({0: batch} for _ in example)
        torch.export.save(torch.export.export(program.module().eval(), example, dynamic_shapes=axes), str(model))
    np.savez(data, **dict[str, Any](samples))
    return model, data


def job_of(label: str, model: Path, data: Path, arguments: argparse.Namespace, folder: Path) -> Json:
    with deployment(folder / "home") as service, Client(service.url) as client:
        uploaded, samples = client.upload_model(model), client.upload_dataset(data)
        offered = client.capabilities()["precisions"]
        spec = {
            "model_id": uploaded["id"],
            "calibration": {"dataset_id": samples["id"]},
            "validation": {"dataset_id": samples["id"], "metric": "cosine", "max_accuracy_loss_percent": 1.0},
            "precisions": [name for name in PRECISIONS if name in offered],
            "search": {"strategy": "exhaustive"},
            "benchmark": {
                "batch_sizes": [*BATCHES],
                "min_seconds": arguments.job_seconds,
                "allow_noisy": True,
            },
            "budget_seconds": arguments.budget,
        }
        job = client.wait(client.submit(spec)["id"], check=False)
        if job["status"] != "succeeded":
            raise CannotMeasure(f"{label}: the job {job['status']}: {job['error']}")
        return client.report(job["id"])


def fastest(report: Json, precision: str, batch: int, *, ours: bool) -> tuple[str, float] | None:
    """Candidate and p50 in ms, of those that keep what the job asked for."""
    found = [
        (c["batches"][str(batch)]["p50_ms"], c["id"])
        for c in report["candidates"]
        if (c["backend"] == OURS) is ours
        and c["precision"] == precision
        and c["status"] in ("picked", "kept")
        and c["batches"].get(str(batch), {}).get("p50_ms")
    ]
    if not found:
        return None
    ms, candidate = min(found)
    return candidate, ms


def rows_of(label: str, report: Json) -> tuple[list[list[str]], Json]:
    rows, figures = [], {}
    for precision in PRECISIONS:
        for batch in BATCHES:
            ours = fastest(report, precision, batch, ours=True)
            theirs = fastest(report, precision, batch, ours=False)
            if ours is None or theirs is None:
                continue
            ratio = ours[1] / theirs[1]
            figures[f"{precision} b={batch}"] = {"ours": ours, "theirs": theirs, "ratio": ratio}
            cells = [f"{cid} {ms:.2f}" for cid, ms in (ours, theirs)]
            rows.append([label, precision, str(batch), *cells, f"{ratio:.2f}"])
    return rows, figures


def measure(arguments: argparse.Namespace) -> Json:
    rows: list[list[str]] = []
    found: Json = {}
    for name in arguments.models.split(","):
        if name not in PROGRAMS:
            raise CannotMeasure(f"no such model: {name}; there are {', '.join(PROGRAMS)}")
        label = PROGRAMS[name].label
        say(f"{label} …")
        with scratch(arguments.folder, 4 << 30) as folder:
            try:
                report = job_of(label, *written(PROGRAMS[name], folder), arguments, folder)
            except (CannotMeasure, AnnealError) as failure:
                print(f"Not measured: {label}: {failure}\n", flush=True)
                continue
        told = [(c["id"], c["status"], c["reason"][:90]) for c in report["candidates"]]
        print(f"{label}: {report['picked']} is the pick.\n\n{table(['candidate', 'status', 'reason'], told)}\n")
        sys.stdout.flush()
        more, found[name] = rows_of(label, report)
        rows += more
    if rows:
        head = ["model", "precision", "batch", "Inductor: p50 ms", "its ONNX form: p50 ms", "Inductor ÷ it"]
        print(table(head, rows))
    return {"models": found}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default=",".join(PROGRAMS), help="some of these (default: all)")
    options.add_argument("--budget", type=int, default=900, help="budget_seconds of each job")
    options.add_argument("--job-seconds", type=float, default=1.5, help="benchmark.min_seconds of the jobs")
    execute(measure, options.parse_args())
