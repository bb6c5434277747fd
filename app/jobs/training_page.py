"""What training did, on the report's page: a curve for each training, and what it says."""

from __future__ import annotations

import math

from app.figures import number, percent
from app.jobs.page_parts import Json, as_number, hint, objects, part_of, svg, text

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 740, 20, 180


def training(report: Json) -> str:
    """Each training once, whichever candidates start from it."""
    found: dict[str, tuple[Json, list[str]]] = {}
    for candidate in objects(report.get("candidates")):
        for told in part_of(candidate, "details").values():
            done = part_of(told, "training") if isinstance(told, dict) else {}
            if objects(done.get("curve")):
                found.setdefault(repr(done["curve"]), (done, []))[1].append(str(candidate.get("name")))
    return "".join(_one(done, names) for done, names in found.values())


def _one(done: Json, names: list[str]) -> str:
    whose = f"<h4>{text(', '.join(names))}</h4>"
    before, after = (as_number(done.get(name)) for name in ("loss_before", "loss"))
    agreed = [as_number(done.get(name)) for name in ("agreement_before", "agreement")]
    line = f"{text(done.get('steps'))} steps on {text(done.get('samples'))} samples in {text(done.get('seconds'))} s"
    if before is not None and after is not None:
        line += f"; on {text(done.get('held_out'))} samples held out the distance to the original went from "
        line += f"{number(before)} to {number(after)}"
    if agreed[0] is not None and agreed[1] is not None:
        line += f", agreement from {percent(agreed[0])} to {percent(agreed[1])}"
    ended = done.get("ended")
    why = f" It ended because {text(ended)}." if ended else ""
    taken = f"The weights of step {text(done.get('best_step'))} were taken."
    backed_off = as_number(done.get("backed_off"))
    if backed_off:
        taken += f" The learning rate was made smaller {number(backed_off)} times, each from the best weights on."
    return f"{whose}{_curve(done)}<p class=sub>{line}. {taken}{why}</p>"


def _curve(done: Json) -> str:
    """The loss by step, on a logarithmic scale: held-out samples as a line, the steps' own as dots."""
    points = [
        (as_number(p.get("step")), as_number(p.get("loss")), as_number(p.get("train_loss")))
        for p in objects(done["curve"])
    ]
    known = [(step, loss, own) for step, loss, own in points if step is not None and loss is not None]
    values = [v for _, loss, own in known for v in (loss, own) if v is not None and v > 0]
    if len(known) < 2 or not values:
        return ""
    low, high = math.log10(min(values)), math.log10(max(values))
    most, spread = max(step for step, _, _ in known) or 1.0, (high - low) or 1.0

    def x(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * step / most

    def y(value: float) -> float:
        place = (math.log10(max(value, 10**low)) - low) / spread
        return _BOTTOM - (_BOTTOM - _TOP) * place

    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss, _ in known)
    best = as_number(done.get("best_step"))
    marks = (
        f"<line x1={_LEFT} x2={_RIGHT} y1={_BOTTOM} y2={_BOTTOM} stroke=currentColor />"
        f"<line x1={_LEFT} x2={_LEFT} y1={_TOP} y2={_BOTTOM} stroke=currentColor />"
        f"<text x=0 y={_TOP + 4}>{number(10**high)}</text><text x=0 y={_BOTTOM + 4}>{number(10**low)}</text>"
        f"<text x={_RIGHT} y={_BOTTOM + 20} text-anchor=end>step {number(most)}</text>"
        f"<polyline points='{line}' fill=none stroke='var(--good)' stroke-width=2 />"
    )
    for step, loss, own in known:
        at = f"step {number(step)}: {number(loss)} on samples held out"
        if own is not None:
            at += f", {number(own)} on those trained on"
            marks += hint(at, f"<circle cx={x(step):.1f} cy={y(own):.1f} r=2 fill='var(--base)'/>")
        best_one = "r=5" if step == best else "r=3 fill-opacity=.5"
        marks += hint(at, f"<circle cx={x(step):.1f} cy={y(loss):.1f} {best_one} fill='var(--good)'/>")
    return svg(_BOTTOM + 25, "loss by step: a line for samples held out, dots for those trained on", marks)
