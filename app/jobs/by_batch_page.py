"""The report page's part on two engines in one bundle."""

from __future__ import annotations

from app.jobs.page_parts import Json, part_of, rows_table, text

_SHARES = {
    "least": "batches from",
    "most": "to",
    "name": "engine",
    "backend": "backend",
    "precision": "precision",
    "size_mb": "MB on disk",
    "accuracy_loss_percent": "points of accuracy lost",
    "accuracy_verdict": "",
}
_AT_BATCH = {
    "batch": "batch size",
    "answered_by": "answered by",
    "speedup": "speed-up",
    "speedup_ci": "95 % interval",
    "small_speedup": "the first alone",
    "large_speedup": "the second alone",
    "measured": "these by",
}
_COSTS = {"size_mb": "MB on disk", "memory_mb": "MB of memory", "cold_start_ms": "ms of cold start"}


def by_batch(told: Json) -> str:
    """Where one overtakes the other, what each brings, and what both cost."""
    border, costs = told.get("border"), part_of(told, "costs")
    if not isinstance(border, list) or len(border) != 2:
        return ""
    alone = part_of(costs, "alone")
    taken, less = _costs(costs), _costs(alone)
    said = f"One overtakes the other between batch sizes {text(border[0])} and {text(border[1])}."
    said += f" Both are loaded: {taken}" if taken else ""
    said += f"; {text(alone.get('candidate'))} alone would take {less}" if taken and less else ""
    shares, rows = rows_table(told.get("engines"), _SHARES, 2), rows_table(told.get("batches"), _AT_BATCH, 24)
    return f"<p class=sub>{said}</p>{shares}{rows}"


def _costs(costs: Json) -> str:
    return ", ".join(f"{text(costs.get(n))} {words}" for n, words in _COSTS.items() if costs.get(n) is not None)
