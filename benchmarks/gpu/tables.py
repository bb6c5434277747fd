"""Markdown of what `run.py` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from breakdown import parts

Found = Mapping[str, Any]
_EXACT = 0.999  # the cosine of a pick in fp16


def tables(folder: Path, labels: Mapping[str, str]) -> str:
    """One table per model, then what would be picked beside the best of the others, and beside each tool alone."""
    found = {name: json.loads(path.read_text()) for name in labels if (path := folder / f"{name}.json").exists()}
    each = [_model(labels[name], one) for name, one in found.items()]
    return "\n\n".join([*each, _picks(labels, found), _tools(found), *_breakdowns(labels, found)])


def ours(label: str) -> bool:
    """A job's candidates: the CUDA provider's engines as well."""
    trial = "export's sizes" in label or "but attention" in label
    return label.startswith(("Inductor", "ORT", "TensorRT")) and not trial


def pick(contenders: Found) -> str | None:
    """The fastest of the service's engines that keeps its accuracy, by the turns that choose."""
    fit = {
        label: figures["choosing_ms"]
        for label, figures in contenders.items()
        if ours(label) and "choosing_ms" in figures and figures["cosine"] >= _EXACT
    }
    return min(fit, key=lambda label: fit[label]) if fit else None


def _model(label: str, found: Found) -> str:
    sizes = sorted(found["batches"], key=int)
    names = list(dict.fromkeys(n for s in sizes for n in found["batches"][s]["contenders"]))
    head = [label, *(f"b={s}: GPU ms (ms)" for s in sizes), "least cosine", "build + cold start, or ready, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    failed: dict[str, str] = {}
    for name in names:
        cells = [found["batches"][s]["contenders"].get(name, {}) for s in sizes]
        for why in [c["failed"] for c in cells if "failed" in c][:1]:
            failed[name] = why
        known = [c for c in cells if "gpu_ms" in c]
        if not known:
            continue
        times = [f"{c['gpu_ms']:.3f} ({c['ms']:.3f})" if "gpu_ms" in c else "–" for c in cells]
        first = known[0]
        ready = ", ".join(f"{c['ready_s']:.0f}" for c in known)
        if "build_s" in first:
            ready = f"{first['build_s']:.0f} + {first['load_s'] + first['first_call_s']:.1f}"
        lines.append("| " + " | ".join([name, *times, f"{min(c['cosine'] for c in known):.6f}", ready]) + " |")
    lines += [f"\n{name} failed: {why[:200]}" for name, why in failed.items()]
    return "\n".join(lines)


def _compared(found: Mapping[str, Found]) -> Iterator[tuple[str, str, str, float, str, float]]:
    """Model, batch size, the pick and its ms, the best of the others and its ms; by the turns that judge."""
    for name, one in found.items():
        for size, kept in one["batches"].items():
            contenders = {n: c for n, c in kept["contenders"].items() if "judging_ms" in c}
            picked = pick(contenders)
            others = {
                n: c["judging_ms"] for n, c in contenders.items() if n.startswith(("torch", "ORT")) and n != picked
            }
            if picked is not None and others:
                best = min(others, key=lambda n: others[n])
                yield name, size, picked, contenders[picked]["judging_ms"], best, others[best]


def _picks(labels: Mapping[str, str], found: Mapping[str, Found]) -> str:
    lines = ["| model | b | pick | GPU ms | the best of the others | GPU ms | ratio |", "|---|---|---|---|---|---|---|"]
    ratios = []
    for name, size, picked, ms, best, other in _compared(found):
        ratios.append(ms / other)
        lines.append(f"| {labels[name]} | {size} | {picked} | {ms:.3f} | {best} | {other:.3f} | {ratios[-1]:.3f} |")
    met = sum(r <= 1.02 for r in ratios)
    return "\n".join([*lines, f"\nAt most 1.02: {met} of {len(ratios)}. Geometric mean: {_geometric(ratios):.3f}"])


def _tools(found: Mapping[str, Found]) -> str:
    """The pick over one tool alone, where both were measured; of a tool's configurations the fastest."""
    tools = {
        "ONNX Runtime's CUDA provider, its best": "ORT",
        "torch eager in a CUDA graph": "torch eager",
        "torch.compile": "torch compiled",
        "torch.compile, max-autotune": "torch max-autotune",
        "torch, its best": "torch",
    }
    lines = ["| the pick's time over that of | geometric mean | of |", "|---|---|---|"]
    for tool, start in tools.items():
        ratios = []
        for one in found.values():
            for kept in one["batches"].values():
                contenders = {n: c for n, c in kept["contenders"].items() if "judging_ms" in c}
                picked = pick(contenders)
                theirs = [c["judging_ms"] for n, c in contenders.items() if n.startswith(start)]
                if picked is not None and theirs:
                    ratios.append(contenders[picked]["judging_ms"] / min(theirs))
        if ratios:
            lines.append(f"| {tool} | {_geometric(ratios):.3f} | {len(ratios)} |")
    return "\n".join(lines)


def _breakdowns(labels: Mapping[str, str], found: Mapping[str, Found]) -> Iterator[str]:
    for name, one in found.items():
        for size, kept in one["batches"].items():
            told = {label: parts(kernels) for label, kernels in kept.get("kernels", {}).items()}
            if not told:
                continue
            names = list(dict.fromkeys(part for each in told.values() for part in each))
            lines = [f"| {labels[name]}, b={size}, ms | " + " | ".join([*names, "all"]) + " |"]
            lines.append("|" + "---|" * (len(names) + 2))
            for label, each in told.items():
                cells = [f"{each.get(part, 0.0):.3f}" for part in names]
                lines.append("| " + " | ".join([label, *cells, f"{sum(each.values()):.3f}"]) + " |")
            yield "\n".join(lines)


def _geometric(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan")
