"""The action's step: runs `anneal optimize`, tells the outcome to the workflow, and exits by it. Needs nothing but
Python and the command beside it."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OPTIONS = {
    "DATA": "--data",
    "CALIBRATION": "--calibration",
    "VALIDATION": "--validation",
    "MAX_LOSS": "--max-loss",
    "P99": "--p99",
    "OBJECTIVE": "--objective",
    "BUDGET": "--budget",
    "SPEC": "--spec",
    "NAME": "--name",
    "BUNDLE": "--out",
    "REPORT": "--html",
}
_MARKS = {0: "✅", 3: "➖"}
_MOST_ROWS = 12


def command(inputs: Mapping[str, str]) -> list[str]:
    """`--option=value`: a value that begins with a dash is no option."""
    anneal = Path(sys.executable).with_name("anneal")
    options = [f"{option}={inputs[name]}" for name, option in _OPTIONS.items() if inputs.get(name)]
    return [str(anneal), "optimize", *options, "--watch", "--json", "--", inputs["MODEL"]]


def summary(told: Mapping[str, Any], exit_code: int) -> str:
    """Markdown for the run's page."""
    if "error" in told:
        error = told["error"]
        lines = [f"## ❌ Anneal: {plain(error.get('code'))}", "", plain(error.get("detail"))]
        if error.get("remedy"):
            lines += ["", f"**What to do:** {plain(error['remedy'])}"]
        return "\n".join([*lines, ""])
    job, report = told.get("job") or {}, told.get("report") or {}
    lines = [f"## {_MARKS.get(exit_code, '❌')} Anneal: {plain(told.get('verdict'))}", "", plain(told.get("detail"))]
    final, analysis = report.get("final_metrics") or {}, report.get("analysis") or {}
    if final:
        rows = [
            ("Latency (p50)", analysis.get("original_latency_ms"), final.get("latency_ms"), "ms"),
            ("Size", analysis.get("original_size_mb"), final.get("size_mb"), "MB"),
        ]
        lines += ["", "| | original | engine |", "|---|---:|---:|"]
        lines += [f"| {name} | {number(was, unit)} | {number(now, unit)} |" for name, was, now, unit in rows]
        lines.append(f"| Speed-up | 1x | {plain(final.get('speedup'))}{interval(final.get('speedup_ci'))} |")
        if final.get("accuracy_metric"):
            loss = number(final.get("accuracy_loss_percent"), "%")
            proven = final.get("accuracy_verdict") or "not judged"
            lines.append(f"| Loss ({plain(final['accuracy_metric'])}) | | {loss}, {plain(proven)} |")
    missed = [check for check in report.get("checks") or () if check.get("passed") is False]
    if missed:
        lines += ["", "| limit missed | found | allowed |", "|---|---:|---:|"]
        lines += [f"| {plain(c.get('name'))} | {number(c.get('value'))} | {number(c.get('limit'))} |" for c in missed]
    candidates = report.get("candidates") or []
    if candidates:
        lines += [
            "",
            f"<details><summary>{len(candidates)} candidates</summary>",
            "",
            "| candidate | precision | | why |",
        ]
        lines.append("|---|---|---|---|")
        shown = candidates[:_MOST_ROWS]
        rows_of = [(c.get("name"), c.get("precision"), c.get("status"), c.get("reason")) for c in shown]
        lines += ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows_of]
        lines += ["", "</details>"]
    lines += ["", *(f"> {plain(w)}" for w in report.get("warnings") or ())]
    on = f" on {plain(analysis['hardware'])}" if analysis.get("hardware") else ""
    return "\n".join([*lines, "", f"Job `{plain(job.get('id'))}`{on}.", ""])


def plain(value: Any) -> str:
    """Text that stays text in a table of Markdown, whatever a model is named."""
    text = html.escape(" ".join(str("–" if value is None else value).split()))
    return "".join(f"\\{c}" if c in "\\`*{}[]|#" else c for c in text)


def number(value: Any, unit: str = "") -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:.3g} {unit}".strip()


def interval(bounds: Any) -> str:
    return f" ({bounds[0]:.3g} to {bounds[1]:.3g})" if isinstance(bounds, list) and len(bounds) == 2 else ""


def outputs(told: Mapping[str, Any], exit_code: int) -> dict[str, str]:
    job, report = told.get("job") or {}, told.get("report") or {}
    engines = job.get("engine_ids") or [""]
    speedup = str((report.get("final_metrics") or {}).get("speedup") or "").removesuffix("x")
    return {
        "verdict": str(told.get("verdict") or (told.get("error") or {}).get("code") or ""),
        "exit-code": str(exit_code),
        "job-id": str(job.get("id") or ""),
        "engine-id": str(engines[0]),
        "speedup": speedup,
        "bundle": str(told.get("bundle") or ""),
        "report": str(told.get("html") or ""),
    }


def append(variable: str, text: str) -> None:
    """To the file that the runner names."""
    path = os.environ.get(variable)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


def main() -> int:
    inputs = {name.removeprefix("INPUT_"): value for name, value in os.environ.items() if name.startswith("INPUT_")}
    if not os.environ.get("ANNEAL_API_KEY"):
        os.environ.pop("ANNEAL_API_KEY", None)
    done = subprocess.run(command(inputs), stdout=subprocess.PIPE, text=True, check=False)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        told = {"error": {"code": "no_answer", "detail": f"anneal exited with {done.returncode}: {done.stdout[-500:]}"}}
    append("GITHUB_STEP_SUMMARY", summary(told, done.returncode))
    found = outputs(told, done.returncode)
    append("GITHUB_OUTPUT", "".join(f"{name}={' '.join(value.split())}\n" for name, value in found.items()))
    print(f"{found['verdict']}: {found['job-id']} (exit code {done.returncode})")
    accepted = {code.strip() for code in inputs.get("ACCEPT", "").split(",")}
    if str(done.returncode) in accepted:
        return 0
    if done.returncode != 0:
        detail = told.get("detail") or (told.get("error") or {}).get("detail") or ""
        # Of a workflow command's message, these are to be escaped.
        escaped = str(detail).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        print(f"::error title=Anneal::{escaped}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
