"""Markdown of what `inductor.py` measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def tables(folder: Path, labels: Mapping[str, str]) -> str:
    """One table per model, then how the engine in fp16 compares with the fastest of torch's, and with fp8."""
    found = {name: json.loads(path.read_text()) for name in labels if (path := folder / f"{name}.json").exists()}
    ratios = _ratios("fp16 ÷ the fastest of torch", labels, found, lambda who: who.startswith("torch"))
    against = _ratios("fp16 ÷ fp8", labels, found, lambda who: who == "fp8")
    return "\n\n".join([*(_model(labels[name], one) for name, one in found.items()), ratios, against])


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


def _ratios(head: str, labels: Mapping[str, str], found: Mapping[str, Any], theirs: Callable[[str], bool]) -> str:
    """Of GPU times: `fp16` over the fastest of `theirs`."""
    sizes = sorted({s for one in found.values() for s in one["batches"]}, key=int)
    lines = [f"| {head} | " + " | ".join(f"b={s}" for s in sizes) + " |", "|" + "---|" * (len(sizes) + 1)]
    every: list[float] = []
    for name, one in found.items():
        cells = []
        for size in sizes:
            figures = one["batches"].get(size, {})
            others = [v["gpu_ms"] for who, v in figures.items() if theirs(who)]
            if "fp16" not in figures or not others:
                cells.append("–")
                continue
            every.append(figures["fp16"]["gpu_ms"] / min(others))
            cells.append(f"{every[-1]:.3f}")
        if any(cell != "–" for cell in cells):
            lines.append(f"| {labels[name]} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([f"\nGeometric mean: {float(np.exp(np.mean(np.log(every)))):.3f}"] if every else [])])
