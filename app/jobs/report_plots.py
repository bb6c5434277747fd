"""The report page's drawings, as SVG: nothing runs in them, and they need no script."""

from __future__ import annotations

from collections.abc import Sequence

from app.figures import number
from app.jobs.page_parts import Json, as_number, hint, objects, part_of, svg, text

_FRONT = "<p class=sub>A thick line: none beats it in both speed and accuracy. A circle is as large as the engine.</p>"
_LEFT, _WIDTH = 270, 330  # where bars begin, and the longest


def configurations(report: Json) -> list[Json]:
    """The baseline, then the candidates that were measured in full; the others stand in the search's table."""
    baseline = part_of(report, "baseline")
    return [*([{"name": "the original", **baseline}] if baseline else []), *measured(report)]


def measured(report: Json) -> list[Json]:
    return [c for c in objects(report.get("candidates")) if c.get("measured", "full") == "full"]


def _batch_sizes(found: Sequence[Json]) -> list[str]:
    sizes = {str(size) for c in found for size in part_of(c, "batches")}
    return sorted(sizes, key=lambda size: (len(size), size))[:16]


def _at(configuration: Json, size: str) -> Json:
    return part_of(part_of(configuration, "batches"), size)


def _colour(configuration: Json) -> str:
    if configuration.get("status") == "picked":
        return "var(--good)"
    return "var(--base)" if configuration.get("id") == "baseline" else "var(--bar)"


def latencies(report: Json) -> str:
    """One bar chart per batch size."""
    found = configurations(report)
    charts = ""
    for size in _batch_sizes(found):
        rows = [(c, as_number(_at(c, size).get("p50_ms"))) for c in found]
        known = [(c, value) for c, value in rows if value is not None]
        if known:
            longest = max(value for _, value in known) or 1.0
            marks = "".join(
                hint(
                    _timed(c, size),
                    f"<text x=0 y={26 * i + 17}>{text(str(c.get('name'))[:40])}</text>"
                    f"<rect x={_LEFT} y={26 * i + 4} width={_WIDTH * value / longest:.1f} height=18 rx=3 "
                    f"fill='{_colour(c)}'/>"
                    f"<text x={_LEFT + 6 + _WIDTH * value / longest:.1f} y={26 * i + 17}>{number(value)} ms</text>",
                )
                for i, (c, value) in enumerate(known)
            )
            charts += f"<h4>batch size {text(size)}</h4>{svg(26 * len(known), f'p50 at batch size {size}', marks)}"
    return charts


def _timed(configuration: Json, size: str) -> str:
    """Its percentiles at a batch size, and of how many calls they are."""
    at = _at(configuration, size)
    told = [(name[:-3], as_number(at.get(name))) for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms")]
    known = ", ".join(f"{name} {number(value)} ms" for name, value in told if value is not None)
    calls = as_number(at.get("samples"))
    return f"{configuration.get('name')}: {known}" + ("" if calls is None else f", of {number(int(calls))} calls")


def speedups(report: Json) -> str:
    """Speed-up over the original with its 95 % interval: a dot and a whisker per candidate and batch size."""
    rows = []
    candidates = measured(report)
    for candidate in candidates:
        for size in _batch_sizes(candidates):
            speedup = part_of(_at(candidate, size), "speedup")
            low, ratio, high = (as_number(speedup.get(k)) for k in ("low", "ratio", "high"))
            if low is not None and ratio is not None and high is not None:
                rows.append((f"{str(candidate.get('name'))[:32]}, b={size}", low, ratio, high, _colour(candidate)))
    if not rows:
        return ""
    most = min(max(1.2, *(high for _, _, _, high, _ in rows)), 20.0)

    def x(value: float) -> float:
        return _LEFT + _WIDTH * min(value, most) / most

    height = 26 * len(rows)
    marks = f"<line x1={x(1):.1f} x2={x(1):.1f} y1=0 y2={height} stroke='currentColor' stroke-dasharray='3 3'/>"
    for i, (label, low, ratio, high, colour) in enumerate(rows):
        y = 26 * i + 13
        told = f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"
        marks += hint(
            f"{label}: {told}",
            f"<text x=0 y={y + 4}>{text(label)}</text>"
            f"<line x1={x(low):.1f} x2={x(high):.1f} y1={y} y2={y} stroke='{colour}' stroke-width=3 />"
            f"<circle cx={x(ratio):.1f} cy={y} r=5 fill='{colour}'/>"
            f"<text x=612 y={y + 4}>{told}</text>",
        )
    return svg(height, "speed-up over the original with its 95 % interval", marks)


def waterfall(report: Json) -> str:
    """From the original's latency to the engine's: what each part takes off, by leaving it out. Parts help or hinder
    each other, so what they do together stands as a step of its own."""
    final = part_of(report, "final_metrics")
    before, after = as_number(final.get("original_latency_ms")), as_number(final.get("latency_ms"))
    applied = objects(report.get("optimizations_applied"))
    ratios = [(str(part.get("name")), as_number(part.get("latency_ratio"))) for part in applied]
    known = [(name, ratio) for name, ratio in ratios if ratio]
    if before is None or after is None or not known:
        return ""
    steps, now = [("the original", 0.0, before, "var(--base)")], before
    for name, ratio in known:
        then = now - (after / ratio - after)  # without it the engine takes after / ratio
        steps.append((name, now, then, "var(--good)" if then <= now else "var(--bad)"))
        now = then
    if abs(now - after) > 0.005 * before:
        steps.append(("together, beyond each alone", now, after, "var(--good)" if after <= now else "var(--bad)"))
    steps.append(("the engine", 0.0, after, "var(--bar)"))
    low = min(0.0, *(min(a, b) for _, a, b, _ in steps))
    high = max(max(a, b) for _, a, b, _ in steps)

    def x(value: float) -> float:
        return _LEFT + _WIDTH * (value - low) / (high - low)

    marks = ""
    for i, (name, start, end, colour) in enumerate(steps):
        whole = i in (0, len(steps) - 1)
        told = f"{number(end)} ms" if whole else f"{'+' if end > start else '−'}{number(abs(end - start))} ms"
        marks += (
            f"<text x=0 y={26 * i + 17}>{text(name[:40])}</text>"
            f"<rect x={x(min(start, end)):.1f} y={26 * i + 4} width={max(abs(x(end) - x(start)), 1):.1f} height=18 "
            f"fill='{colour}'/><text x={x(max(start, end)) + 6:.1f} y={26 * i + 17}>{told}</text>"
        )
    return svg(26 * len(steps), "from the original's latency to the engine's, part by part", marks)


def pareto(report: Json) -> str:
    """Speed, accuracy and size in one picture: latency to the right, loss upwards, the circle's area is the size. Those
    that none beats in both speed and accuracy have a thick line."""
    found = configurations(report)
    sizes = _batch_sizes(found)
    if not sizes:
        return ""
    points = []
    for c in found:
        ms, mb = as_number(_at(c, sizes[0]).get("p50_ms")), as_number(c.get("size_mb"))
        loss = 0.0 if c.get("id") == "baseline" else as_number(part_of(c, "accuracy").get("loss_percent"))
        if ms is not None and loss is not None and mb is not None:
            points.append((c, ms, loss, mb))
    if len(points) < 2:
        return ""
    most_ms, most_mb = max(p[1] for p in points) * 1.1, max(p[3] for p in points)
    low, high = min(0.0, *(p[2] for p in points)), max(0.0, *(p[2] for p in points))
    spread = (high - low) or 1.0
    marks = (
        "<line x1=60 x2=740 y1=240 y2=240 stroke=currentColor /><line x1=60 x2=60 y1=10 y2=240 stroke=currentColor />"
        f"<text x=740 y=262 text-anchor=end>p50 at batch size {text(sizes[0])}, up to {number(most_ms)} ms</text>"
        f"<text x=66 y=20>{number(high)} points lost</text><text x=66 y=236>{number(low)}</text>"
    )
    lines, best = "", report.get("pareto") if isinstance(report.get("pareto"), list) else []
    for i, (c, ms, loss, mb) in enumerate(points, 1):
        x, y = 60 + 670 * ms / most_ms, 220 - 190 * (loss - low) / spread
        radius, line = 4 + 14 * (mb / most_mb) ** 0.5, 3 if best and c.get("id") in best else 1
        drawn = f"fill='{_colour(c)}' fill-opacity=.45 stroke='{_colour(c)}' stroke-width={line}"
        told = f"{c.get('name')}: {number(ms)} ms, {number(loss)} points, {number(mb)} MB"
        marks += hint(
            told,
            f"<circle cx={x:.1f} cy={y:.1f} r={radius:.1f} {drawn} />"
            f"<text x={x + radius + 3:.1f} y={y + 4:.1f}>{i}</text>",
        )
        lines += f"<li>{text(told)}"
    return (
        svg(270, "latency, accuracy lost and size of each configuration", marks)
        + f"{_FRONT if best else ''}<ol>{lines}</ol>"
    )
