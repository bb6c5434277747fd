"""What the shapes beside the typical one say of an engine. Pure: data of `benchmark` and `check_shapes` in, words out.

What is in use (the data's shapes, the job's ranges, or all where nobody says) decides whether it ships; what is beside
it is told, and what the engine answers wrongly there its bundle refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain.spec import OptimizationSpec
from workers.search.objective import ratio_of


def shape_text(dims: Mapping[str, Sequence[int]]) -> str:
    """E.g. `input_ids [1, 128]`; of many inputs the first two."""
    shown = [f"{name} {list(size)}" for name, size in list(dims.items())[:2]]
    return ", ".join(shown) + (", …" if len(dims) > 2 else "")


def not_kept(spec: OptimizationSpec, figures: Mapping[str, Any], *, in_use: bool = True) -> list[str]:
    """Shapes at which "never slower" does not hold of an engine: it is slower with confidence. `in_use`: of those in
    use, else of the others."""
    found = []
    for at in figures.get("shapes") or ():
        if bool(at["in_use"]) is not in_use:
            continue
        where = f"at the {at['label']} shape ({shape_text(at['dims'])})"
        ratio = ratio_of(spec, at)
        if ratio is not None and ratio["high"] < 1.0:
            found.append(f"slower {where}: {ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]")
        elif in_use and not at.get("undisturbed", True) and not spec.benchmark.allow_noisy:
            found.append(f"not known to be no slower {where}: too few of its rounds were undisturbed")
    return found


def fails(figures: Mapping[str, Any]) -> list[str]:
    """Shapes in use at which the engine failed in the benchmark, and the original did not."""
    return [
        f"fails at the {at['label']} shape ({shape_text(at['dims'])}): {at['failed'].get('detail', '')}"[:500]
        for at in figures.get("shapes") or ()
        if "failed" in at and at["in_use"]
    ]


def shape_table(
    spec: OptimizationSpec,
    benchmark: Mapping[str, Any],
    original: Mapping[str, Any],
    engine: Mapping[str, Any],
    batch: str,
    checked: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One engine beside the original at each shape, the typical one first: as `app.domain.report.ShapeReport`.
    `benchmark`: the stage's data; `batch`: the batch size that counts; `checked`: the data of `check_shapes`."""
    typical = benchmark.get("shape")
    if typical is None:
        return []
    pairs = [({**typical, **original["batches"].get(batch, {})}, {**typical, **engine["batches"].get(batch, {})})]
    theirs = {at["label"]: at for at in original.get("shapes") or ()}
    pairs += [(theirs.get(at["label"], {}), at) for at in engine.get("shapes") or ()]
    rows = [_row(spec, first, second) for first, second in pairs]
    rows += [_row(spec, {}, at) for at in benchmark.get("skipped_shapes") or ()]
    answers = {at["label"]: at for at in (checked or {}).get("shapes") or ()}
    for row in rows:
        at = answers.pop(row["label"], None)
        row["answers"] = None if at is None else _answers(at)
    untimed = [{**at, "reason": "not timed", "failed": None} for at in answers.values()]
    return rows + [{**_row(spec, {}, at), "answers": _answers(at)} for at in untimed]


def _row(spec: OptimizationSpec, original: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    ratio, reason = ratio_of(spec, at), at.get("reason")
    holds = None if ratio is None else not ratio["high"] < 1.0
    if at.get("failed"):
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


def _answers(at: Mapping[str, Any]) -> str:
    """The largest loss over all orders of calls, by the measures of each output's kind."""
    if at["failed"]:
        return f"none: {next(iter(at['failed'].values()))}"[:200]
    said = []
    for name, told in at["outputs"].items():
        for measure in _MEASURES[told["kind"]]:
            losses = [f[measure] for f in told["orders"].values() if measure in f]
            said += [f"{name} {max(losses):.2g} % ({measure.replace('_', ' ')})"] if losses else []
    return ", ".join(said[:6])


def _ms(at: Mapping[str, Any]) -> float | None:
    """p50, or the mean where the samples do not carry a median."""
    value = at.get("p50_ms") if at.get("p50_ms") is not None else at.get("mean_ms")
    return None if value is None else round(float(value), 4)


# Answers

_AS_ON_THE_DATA = 3.0  # times the loss at the typical shape, by the same measure
_SCORES = 5.0  # percent: scores of classes may move by so much of their size where the classes stay
_MEASURES = {
    "logits": ("agreement", "normalized_error"),
    "scores_or_numbers": ("agreement", "normalized_error"),
    "embedding": ("cosine",),
    "numbers": ("normalized_error",),
    "exact": ("agreement",),
}


@dataclass(frozen=True)
class Wrong:
    """An engine's answers at one shape, too far from the original's. `code`: `shape_dependent`; `order_dependent` where
    another order of calls gives the right ones; `fails` where there is none."""

    code: str
    label: str
    dims: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    in_use: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: at the {self.label} shape ({shape_text(self.dims)}) {self.detail}"


def wrong_answers(checked: Mapping[str, Any], accuracy: Mapping[str, Any] | None, limit: float) -> list[Wrong]:
    """`checked`: the data of `check_shapes`; `accuracy`: of `validate`; `limit`: the job's, in percent. Right is, at
    every shape and in every order, what is no farther from the original's than the limit, or three times as far as
    on the data, by the measures of the output's kind; scores of classes may be off by 5 % of their size."""
    usual = _usual(accuracy or {})
    return [
        Wrong(code, at["label"], at["dims"], at["sizes"], bool(at["in_use"]), detail)
        for at in checked["shapes"]
        for code, detail in [*_failures(at), *_losses(at, usual, limit)][:1]
    ]


def _failures(at: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    every = {order for told in at["outputs"].values() for order in told["orders"]}
    for order, why in at["failed"].items():
        some = bool(every - set(at["failed"]))
        yield ("order_dependent" if some else "fails"), f"with the {order}: {why}"[:400]


def _usual(accuracy: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(output, measure) → how far it is from the original's on the data, in percent."""
    found = {}
    for name, told in (accuracy.get("outputs") or {}).items():
        for measure, best in (("normalized_error", 0.0), ("cosine", 1.0), ("agreement", 1.0)):
            if told.get(measure) is not None:
                found[name, measure] = 100 * abs(best - float(told[measure]))
    return found


def _losses(at: Mapping[str, Any], usual: Mapping[tuple[str, str], float], limit: float) -> Iterator[tuple[str, str]]:
    for name, told in at["outputs"].items():
        for measure in _MEASURES[told["kind"]]:
            most = max(limit, _AS_ON_THE_DATA * usual.get((name, measure), 0.0))
            if told["kind"] == "logits" and measure == "normalized_error":
                most = max(most, _SCORES)
            by_order = {order: f[measure] for order, f in told["orders"].items() if measure in f}
            worst = max(by_order, key=lambda order: by_order[order], default=None)
            if worst is None or by_order[worst] <= most:
                continue
            loss = f"{name!r} loses {by_order[worst]:.3g} % ({measure.replace('_', ' ')}) with the {worst}"
            known = usual.get((name, measure))
            if min(by_order.values()) <= min(most, by_order[worst] / _AS_ON_THE_DATA):
                yield "order_dependent", f"{loss}, and {min(by_order.values()):.3g} % in another order of calls"
            elif at["label"] == "typical" and known is not None:
                yield "order_dependent", f"{loss}, and {known:.3g} % in the order of the data"
            else:
                yield "shape_dependent", f"{loss}; on the data {known or 0:.3g} %, and allowed is {most:.3g} %"


def unfit(checked: Mapping[str, Any] | None, accuracy: Mapping[str, Any] | None, limit: float) -> list[str]:
    """Why an engine must not ship: it answers wrongly at a shape in use, or by the order of calls."""
    found = wrong_answers(checked, accuracy, limit) if checked else []
    return [str(w) for w in found if w.in_use or w.code == "order_dependent"]


def accepted(
    checked: Mapping[str, Any] | None, accuracy: Mapping[str, Any] | None, limit: float
) -> dict[str, list[int | None]]:
    """The sizes of free axes, by name, that the bundle takes: [least, most], None where there is no bound. Only axes
    that have to be bounded, as the engine answers wrongly beyond."""
    if not checked or not checked["shapes"]:
        return {}
    wrong = [w for w in wrong_answers(checked, accuracy, limit) if not w.in_use]
    typical = next(at for at in checked["shapes"] if at["label"] == "typical")["sizes"]
    right = [at["sizes"] for at in checked["shapes"] if at["label"] not in {w.label for w in wrong}]
    bounds: dict[str, list[int | None]] = {}
    for w in wrong:
        for name, size in w.sizes.items():
            known = sorted({sizes[name] for sizes in right})
            bound = bounds.setdefault(name, [None, None]) if size != typical[name] else None
            if bound is None:
                continue
            if size < typical[name]:
                least = next(s for s in known if s > size)
                bound[0] = max(least, bound[0] or 0)
            else:
                most = next(s for s in reversed(known) if s < size)
                bound[1] = most if bound[1] is None else min(most, bound[1])
    return bounds


def narrowest(found: Sequence[Mapping[str, Sequence[int | None]]]) -> dict[str, list[int | None]]:
    """What all of several engines take."""
    bounds: dict[str, list[int | None]] = {}
    for name, (least, most) in ((name, bound) for one in found for name, bound in one.items()):
        low, high = bounds.get(name, [None, None])
        lows, highs = [b for b in (low, least) if b is not None], [b for b in (high, most) if b is not None]
        bounds[name] = [max(lows, default=None), min(highs, default=None)]
    return bounds
