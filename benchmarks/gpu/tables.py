"""Markdown of what `inductor.py` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def tables(folder: Path, labels: Mapping[str, str]) -> str:
    """One table per model, then how each engine compares with the fastest of torch's contenders."""
    found = {name: json.loads(path.read_text()) for name in labels if (path := folder / f"{name}.json").exists()}
    return "\n\n".join([*(_model(labels[name], one) for name, one in found.items()), _ratios(labels, found)])


def _model(label: str, found: Mapping[str, Any]) -> str:
    sizes = sorted(found["batches"], key=int)
    names = list(dict.fromkeys(n for s in sizes for n in found["batches"][s]))
    head = [label, *(f"b={s}: GPU ms (ms)" for s in sizes), "least cosine", "ready, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        cells = [found["batches"][s].get(name) for s in sizes]
        known = [c for c in cells if c]
        built = found["built"].get(name)
        first = f"{known[0].get('load_s', 0) + known[0].get('first_call_s', 0):.1f}"
        ready = f"built {built['build_s']}, then {first}" if built else ", ".join(str(c["ready_s"]) for c in known)
        times = [f"{c['gpu_ms']:.3f} ({c['ms']:.3f})" if c else "–" for c in cells]
        lines.append("| " + " | ".join([name, *times, f"{min(c['cosine'] for c in known):.6f}", ready]) + " |")
    lines += [f"\n{name} failed: {why}" for name, why in found.get("failed", {}).items()]
    return "\n".join(lines)


def _ratios(labels: Mapping[str, str], found: Mapping[str, Any]) -> str:
    sizes = sorted({s for one in found.values() for s in one["batches"]}, key=int)
    lines = ["| engine ÷ the fastest of torch | " + " | ".join(f"b={s}" for s in sizes) + " |"]
    lines.append("|" + "---|" * (len(sizes) + 1))
    every: list[float] = []
    for name, one in found.items():
        cells = []
        for size in sizes:
            figures = one["batches"].get(size, {})
            ours = [v["gpu_ms"] for n, v in figures.items() if not n.startswith("torch")]
            theirs = [v["gpu_ms"] for n, v in figures.items() if n.startswith("torch")]
            if not ours or not theirs:
                cells.append("–")
                continue
            every.append(min(ours) / min(theirs))
            cells.append(f"{every[-1]:.3f}")
        lines.append(f"| {labels[name]} | " + " | ".join(cells) + " |")
    mean = f"\nGeometric mean: {float(np.exp(np.mean(np.log(every)))):.3f}" if every else ""
    return "\n".join(lines) + mean
