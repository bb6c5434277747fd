"""The tables of `engines.py`, from its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from _common import table, verdict
from peers.make import LABELS

BATCHES = ("1", "8")
MAX_LOSS = 1.0
SAME_AS_BEST = 1.02
MEAN_GAIN = 0.9
ANNEAL, BASELINE = "anneal", "ort"

Json = Mapping[str, Any]


def accurate(engine: Json) -> bool:
    """Whether it ran, on every batch size, and keeps the accuracy."""
    return bool(engine.get("batches")) and not engine.get("error") and engine["accuracy"]["loss_percent"] <= MAX_LOSS


def model_table(entry: Json) -> str:
    """One row per engine."""
    rows = []
    for name, engine in entry["engines"].items():
        cells = [LABELS[name]]
        for batch in BATCHES:
            at = engine.get("batches", {}).get(batch)
            cells += [f"{at['p50_ms']:.3g}", interval(at["ratio"])] if at else ["–", "–"]
        accuracy = engine.get("accuracy")
        if accuracy is None:
            loss = "–"
        else:
            loss = f"broken ({accuracy['broken']})" if accuracy["broken"] else f"{accuracy['loss_percent']:.3f}"
        seconds = engine.get("seconds")
        cells += [loss, "–" if seconds is None else f"{seconds:.0f} s", engine.get("error") or remark(engine)]
        rows.append(cells)
    head = ["engine"]
    head += [text for b in BATCHES for text in (f"p50 ms b={b}", f"÷ ORT b={b} [95 %]")]
    return table([*head, "loss, %", "time to result", "remark"], rows)


def interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def remark(engine: Json) -> str:
    facts = engine.get("facts") or {}
    if "candidate" in facts:
        return f"{facts['candidate']} on {facts['backend']}, {facts['precision']}"
    return str(facts.get("INFERENCE_PRECISION_HINT", ""))


def best_peer(engines: Mapping[str, Json], batch: str) -> tuple[str, float] | None:
    """The fastest peer that keeps the accuracy, and its latency over ONNX Runtime's default in the same rounds."""
    fit = {n: e["batches"][batch]["ratio"]["ratio"] for n, e in engines.items() if n != ANNEAL and accurate(e)}
    return min(fit.items(), key=lambda item: item[1]) if fit else None


def summary(models: Mapping[str, Json]) -> str:
    """Anneal beside the best accurate peer on each model, and the geometric means."""
    rows, compared, reached = [], 0, 0
    for entry in models.values():
        engines = entry["engines"]
        own = engines.get(ANNEAL, {})
        cells = [entry["label"]]
        for batch in BATCHES:
            best = best_peer(engines, batch)
            if best is None or not accurate(own):
                compared += ANNEAL in engines  # an engine that fails or loses too much has missed the goal
                cells += ["–", "–", "**missed**" if ANNEAL in engines else "–"]
                continue
            versus = own["versus_best"][batch]
            compared, reached = compared + 1, reached + (versus["ratio"] <= SAME_AS_BEST)
            cells += [LABELS[best[0]], interval(versus), verdict(versus["ratio"] <= SAME_AS_BEST)]
        cells.append(remark(own) if own else "–")
        rows.append(cells)
    head = ["model"]
    head += [t for b in BATCHES for t in (f"best peer b={b}", f"Anneal ÷ it b={b} [95 %]", f"≤ {SAME_AS_BEST}")]
    return "\n\n".join(
        [
            table([*head, "Anneal's pick"], rows),
            f"At or below {SAME_AS_BEST} × the best peer that keeps the accuracy: {reached} of {compared}.",
            means(models),
        ]
    )


def means(models: Mapping[str, Json]) -> str:
    """Geometric mean of each tool's ratio to ONNX Runtime over all models and batch sizes."""
    logs: dict[str, list[float]] = {}
    fallbacks: dict[str, int] = {}
    names = [n for n in LABELS if n != BASELINE and any(n in entry["engines"] for entry in models.values())]
    for entry in models.values():
        for name in names:
            engine = entry["engines"].get(name, {})
            fit = accurate(engine)
            fallbacks[name] = fallbacks.get(name, 0) + (not fit)
            for batch in BATCHES:
                logs.setdefault(name, []).append(math.log(engine["batches"][batch]["ratio"]["ratio"]) if fit else 0.0)
    found = {n: math.exp(sum(v) / len(v)) for n, v in logs.items() if v}
    rows = [
        [LABELS[n], f"{m:.3f}", f"{fallbacks[n]} of {len(models)}"]
        for n, m in sorted(found.items(), key=lambda item: item[1])
    ]
    text = table(["tool", "geometric mean ÷ ORT", "models that count as 1.0"], rows)
    text += f"\n\nWhere a tool fails or loses more than {MAX_LOSS:g} %, it counts as ONNX Runtime's default (1.0)."
    peers = {n: m for n, m in found.items() if n != ANNEAL}
    if ANNEAL in found and peers:
        best = min(peers, key=lambda n: peers[n])
        relative = found[ANNEAL] / peers[best]
        text += (
            f"\nAnneal's mean ÷ the best single tool's ({LABELS[best]}): {relative:.3f}; "
            f"goal ≤ {MEAN_GAIN}: {verdict(relative <= MEAN_GAIN)}."
        )
    return text
