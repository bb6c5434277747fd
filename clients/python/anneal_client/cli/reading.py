"""A report as a terminal shows it: what was gained, whether it can be trusted, what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anneal_client.cli import figures
from anneal_client.cli.screen import Screen, clean

Json = Mapping[str, Any]
_UNITS = {"accuracy_loss_percent": " %", "p99_latency_ms": " ms", "memory_mb": " MB", "size_mb": " MB"}


def mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}


def objects(value: Any) -> list[Json]:
    return [entry for entry in value or () if isinstance(entry, Mapping)] if isinstance(value, list) else []


def show_summary(screen: Screen, report: Json) -> None:
    """What was gained, and the limits."""
    if "targets" in report:
        show_targets(screen, report)
        return
    final, analysis = mapping(report.get("final_metrics")), mapping(report.get("analysis"))
    for warning in report.get("warnings") or ():
        screen.bullet(str(warning), "!", "bold", "yellow")
    if final:
        screen.line(f"  {headline(report)}")
        screen.line(f"  {clean(accuracy(final))}")
        small, large = final.get("size_mb"), analysis.get("original_size_mb")
        screen.line(
            f"  on {clean(analysis.get('hardware', 'this machine'))}: {figures.number(final.get('throughput_qps'))} "
            f"samples per second, memory {figures.megabytes(final.get('memory_mb'))}, "
            f"engine {figures.megabytes(small)}, was {figures.megabytes(large)}"
        )
    limited = [c for c in objects(report.get("checks")) if c.get("limit") is not None or c.get("passed") is False]
    if limited:
        show_checks(screen, limited)


def headline(report: Json) -> str:
    """As "2.14x [2.07, 2.29] as fast: p50 0.111 ms, was 0.237 ms, at batch size 1 in int8"."""
    final, analysis = mapping(report.get("final_metrics")), mapping(report.get("analysis"))
    was = final.get("original_latency_ms") or analysis.get("original_latency_ms")
    at = f" at batch size {final['batch_size']}" if final.get("batch_size") else ""
    precision = clean(mapping(report.get("deployment_config")).get("precision") or "")
    if report.get("picked") in (None, "baseline"):
        return f"the original, as it came: p50 {figures.milliseconds(final.get('latency_ms') or was)}{at}"
    return (
        f"{clean(speedup_of(report))} as fast: p50 {figures.milliseconds(final.get('latency_ms'))}, was "
        f"{figures.milliseconds(was)},{at}" + (f" in {precision}" if precision else "")
    )


def speedup_of(report: Json) -> str:
    """With its interval, from the shipped candidate; else as the report words it."""
    final = mapping(report.get("final_metrics"))
    batch = str(final.get("batch_size") or "")
    shipped: Json = next((c for c in objects(report.get("candidates")) if c.get("id") == report.get("picked")), {})
    told = mapping(mapping(shipped.get("batches")).get(batch)).get("speedup")
    return figures.speedup(told) if isinstance(told, Mapping) else str(final.get("speedup") or figures.DASH)


def accuracy(final: Json) -> str:
    loss, metric = final.get("accuracy_loss_percent"), final.get("accuracy_metric")
    if not figures.is_number(loss):
        why = mapping(final.get("reasons")).get("accuracy_loss_percent")
        return f"accuracy: not measured{f' ({why})' if why else ''}"
    samples = f", on {figures.number(final['accuracy_samples'])} samples" if final.get("accuracy_samples") else ""
    proof = final.get("accuracy_verdict_reason") or final.get("accuracy_verdict") or "unproven"
    return f"accuracy loss {figures.percent(loss)}{f' of {metric}' if metric else ''}{samples}; {proof}"


def show_checks(screen: Screen, checks: Sequence[Json]) -> None:
    screen.title("Limits")
    rows, styles = [], []
    for check in checks:
        passed, unit = check.get("passed"), _UNITS.get(str(check.get("name")), "")
        word = "kept" if passed else ("not checked" if passed is None else "NOT KEPT")
        if passed and check.get("proven") is not None:
            word += ", proven" if check["proven"] else ", unproven"
        value, limit = (figures.number(check.get(name), 3, unit) for name in ("value", "limit"))
        name = str(check.get("name", figures.DASH)).replace("_", " ").removesuffix(" percent").removesuffix(" ms")
        rows.append([name.removesuffix(" mb"), value, limit, word])
        styles.append(("green",) if passed else (("dim",) if passed is None else ("bold", "red")))
    screen.table(("Limit", "Measured", "Agreed", "Verdict"), rows, left=(0, 3), styles=styles)


def show_report(screen: Screen, report: Json) -> None:
    """All that a person reads first; the page has the plots and the rest."""
    if "targets" in report:
        show_targets(screen, report)
        return
    analysis = mapping(report.get("analysis"))
    screen.title(f"{analysis.get('model', 'model')} on {analysis.get('hardware', 'this machine')}")
    show_summary(screen, report)
    screen.title("What was tried")
    head, rows, styles = candidates(report)
    screen.table(head, rows, left=(0, 1, len(head) - 1), styles=styles, fit=0)
    for entry in objects(report.get("candidates")):
        if entry.get("reason") and entry.get("id") != report.get("picked"):
            screen.bullet(f"{entry.get('name') or entry.get('id')}: {entry['reason']}")
    for entry in objects(report.get("skipped")):
        screen.bullet(f"not tried: {entry.get('name', figures.DASH)}, because {entry.get('reason', 'nobody says why')}")
    _show_applied(screen, report)
    advice = report.get("recommendations") or ()
    if advice:
        screen.title("Recommendations")
        for text in advice:
            screen.bullet(str(mapping(text).get("text", text)))


def _show_applied(screen: Screen, report: Json) -> None:
    applied = objects(report.get("optimizations_applied"))
    if not applied:
        return
    screen.title("What each part brought")
    for entry in applied:
        screen.bullet(
            f"{entry.get('name', figures.DASH)}: {entry.get('impact') or entry.get('reason') or figures.DASH}"
        )


def candidates(report: Json) -> tuple[list[str], list[list[str]], list[tuple[str, ...]]]:
    """Head, rows and styles of the table of what was tried, the original first."""
    baseline, tried = mapping(report.get("baseline")), objects(report.get("candidates"))
    entries = [baseline, *tried] if baseline else tried
    sizes = sorted({str(b) for e in entries for b in mapping(e.get("batches"))}, key=lambda b: (len(b), b))
    head = ["Configuration", "Precision", *(f"p50 b={b}" for b in sizes), *(f"Speed-up b={b}" for b in sizes)]
    rows, styles = [], list[tuple[str, ...]]()
    for entry in entries:
        original = entry is baseline
        at = [mapping(mapping(entry.get("batches")).get(b)) for b in sizes]
        shipped = report.get("picked") is not None and entry.get("id") == report["picked"]
        word = "ships" if shipped else "original" if original else str(entry.get("status", figures.DASH))
        loss = mapping(entry.get("accuracy")).get("loss_percent")
        rows.append([
            "original" if original else str(entry.get("name") or entry.get("id")),
            str(entry.get("precision") or figures.DASH),
            *(figures.milliseconds(b.get("p50_ms")) for b in at),
            *("1x" if original else figures.speedup(b.get("speedup")) for b in at),
            figures.DASH if original else figures.percent(loss),
            figures.megabytes(entry.get("size_mb")),
            word,
        ])  # fmt: skip
        styles.append(("bold", "green") if shipped else ("dim",) if word == "dropped" else ())
    return [*head, "Loss", "Size", "Verdict"], rows, styles


def show_targets(screen: Screen, report: Json) -> None:
    """Of a job that compares machines."""
    screen.line(f"  {clean(report.get('headline', ''))}")
    rows = [
        [
            str(t.get("hardware", figures.DASH)),
            figures.number(t.get("per_million_requests"), 4),
            figures.number(t.get("goodput"), 4, "/s"),
            figures.number(t.get("machines"), 4),
            str(t.get("reason") or t.get("status") or ""),
        ]
        for t in objects(report.get("targets"))
    ]
    currency = str(report.get("currency", ""))
    screen.table(("Machine", f"{currency} per million", "Rate", "Machines", ""), rows, left=(0, 4))


def markdown(report: Json) -> str:
    """For a summary of CI, or a comment: cells hold no markup of others."""
    if "targets" in report:
        rows = [
            [t.get("hardware"), figures.number(t.get("per_million_requests"), 4), t.get("reason") or t.get("status")]
            for t in objects(report.get("targets"))
        ]
        return _table(["Machine", "Per million requests", ""], rows, (1,))
    analysis, final = mapping(report.get("analysis")), mapping(report.get("final_metrics"))
    head, rows_, _ = candidates(report)
    lines = [f"### {_cell(analysis.get('model', 'model'))} on {_cell(analysis.get('hardware', 'this machine'))}", ""]
    lines += [f"{_cell(headline(report))}  ", f"{_cell(accuracy(final))}", ""] if final else []
    lines += [f"> {_cell(warning)}\n" for warning in report.get("warnings") or ()]
    lines.append(_table(head, rows_, range(2, len(head) - 1)))
    checks = [c for c in objects(report.get("checks")) if c.get("limit") is not None]
    if checks:
        told = [
            [c.get("name"), figures.number(c.get("value")), figures.number(c.get("limit")),
             "kept" if c.get("passed") else "NOT KEPT"]
            for c in checks
        ]  # fmt: skip
        lines += ["", _table(["Limit", "Measured", "Agreed", "Verdict"], told, (1, 2))]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int]) -> str:
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    lines = [[_cell(c) for c in head], rule, *([_cell(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = clean(figures.DASH if value is None else value)
    for char in "\\`*_[]<>|#":
        text = text.replace(char, f"\\{char}")
    return text.replace("&", "&amp;")
