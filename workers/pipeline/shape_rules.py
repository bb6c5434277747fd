"""What the shapes beside the typical one say of an engine. Pure: figures of `benchmark` in, words out.

What is in use (the data's shapes, the job's ranges, or all where nobody says) decides whether it ships; what is beside
it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.spec import OptimizationSpec


def shape_text(dims: Mapping[str, Sequence[int]]) -> str:
    """E.g. `input_ids [1, 128]`; of many inputs the first two."""
    shown = [f"{name} {list(size)}" for name, size in list(dims.items())[:2]]
    return ", ".join(shown) + (", …" if len(dims) > 2 else "")


def gain_at(spec: OptimizationSpec, at: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ratio with its interval that the objective is judged by."""
    ratio: Mapping[str, Any] | None = at.get("speedup" if spec.objective == "latency" else "throughput_ratio")
    return ratio


def not_kept(spec: OptimizationSpec, figures: Mapping[str, Any], *, in_use: bool = True) -> list[str]:
    """Shapes at which "never slower" does not hold of an engine: it is slower with confidence, or fails where the
    original answers. `in_use`: of those in use, else of the others."""
    found = []
    for at in figures.get("shapes") or ():
        if bool(at["in_use"]) is not in_use:
            continue
        where = f"at the {at['label']} shape ({shape_text(at['dims'])})"
        ratio = gain_at(spec, at)
        if "failed" in at:
            found.append(f"fails {where}, which the original takes: {at['failed'].get('detail', '')}"[:500])
        elif ratio is not None and ratio["high"] < 1.0:
            found.append(f"slower {where}: {ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    return found


def shape_table(
    spec: OptimizationSpec,
    benchmark: Mapping[str, Any],
    original: Mapping[str, Any],
    engine: Mapping[str, Any],
    batch: str,
) -> list[dict[str, Any]]:
    """One engine beside the original at each shape, the typical one first: as `app.domain.report.ShapeReport`.
    `benchmark`: the stage's data; `batch`: the batch size that counts."""
    typical = benchmark.get("shape")
    if typical is None:
        return []
    pairs = [({**typical, **original["batches"].get(batch, {})}, {**typical, **engine["batches"].get(batch, {})})]
    theirs = {at["label"]: at for at in original.get("shapes") or ()}
    pairs += [(theirs.get(at["label"], {}), at) for at in engine.get("shapes") or ()]
    rows = [_row(spec, first, second) for first, second in pairs]
    return rows + [_row(spec, {}, at) for at in benchmark.get("skipped_shapes") or ()]


def _row(spec: OptimizationSpec, original: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    ratio, reason = gain_at(spec, at), at.get("reason")
    holds = None if ratio is None else not ratio["high"] < 1.0
    if "failed" in at:
        holds, reason = False, f"the engine fails here: {at['failed'].get('detail', '')}"[:300]
    elif holds is False:
        reason = "slower than the original here" + ("" if at["in_use"] else ", where neither data nor job are")
    return {
        **{name: at[name] for name in ("label", "dims", "batch", "in_use")},
        "original_ms": _ms(original),
        "latency_ms": _ms(at),
        "speedup": None if ratio is None else round(ratio["ratio"], 4),
        "speedup_ci": None if ratio is None else [round(ratio["low"], 4), round(ratio["high"], 4)],
        "holds": holds,
        "reason": reason,
    }


def _ms(at: Mapping[str, Any]) -> float | None:
    """p50, or the mean where the samples do not carry a median."""
    value = at.get("p50_ms") if at.get("p50_ms") is not None else at.get("mean_ms")
    return None if value is None else round(float(value), 4)
