"""`anneal report` and `anneal compare`."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from anneal_client.cli import figures, values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop, verdict
from anneal_client.cli.outcome import write
from anneal_client.cli.reading import mapping, markdown, show_report, speedup_of
from anneal_client.cli.screen import clean
from anneal_client.cli.service import Service

Json = dict[str, Any]


def add(commands: Any) -> None:
    report = commands.add_parser("report", help="what was measured, and what came out")
    report.add_argument("job", metavar="JOB|ENGINE", type=job_or_engine)
    report.add_argument("--html", type=Path, metavar="FILE", help="keep the page with its plots")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="as Markdown, for a summary of CI; - is stdout")
    report.add_argument("--open", action="store_true", help="in a browser")
    report.set_defaults(run=show)
    compare = commands.add_parser("compare", help="jobs (or engines) side by side")
    compare.add_argument("jobs", metavar="JOB|ENGINE", nargs="+", type=job_or_engine)
    compare.set_defaults(run=run_compare)


def job_or_engine(text: str) -> str:
    if values.is_id("eng", text) or values.is_id("job", text):
        return text
    told = "id of a job or an engine; `anneal jobs` and `anneal engines` list them (job_…, eng_…)"
    raise argparse.ArgumentTypeError(f"{text[:80]!r} is no {told}")


def job_of(service: Service, found: str) -> str:
    """The job's id, of a job or an engine."""
    return str(service.client.engine(found)["job_id"]) if found.startswith("eng_") else found


def show(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        job_id = job_of(service, args.job)
        if args.html is not None:
            write(args.html, service.client.report_page(job_id))
            ctx.say(f"  {clean(args.html)}")
        report: Json = dict(service.client.report(job_id))
    if args.markdown is not None:
        if str(args.markdown) == "-":
            ctx.screen.line(markdown(report).rstrip())
        else:
            write(args.markdown, markdown(report))
            ctx.say(f"  {clean(args.markdown)}")
    if args.open:
        _open(ctx, f"{ctx.place.url}/v1/jobs/{job_id}/report")
    if ctx.json:
        ctx.emit(report)
    elif not (args.html or args.markdown or args.open):
        show_report(ctx.screen, report)
    return Exit.OK


def _open(ctx: Context, url: str) -> None:
    if ctx.place.key:
        remedy = "Sign in on the service's page, or keep the page as a file: `anneal report JOB --html FILE`."
        ctx.say(f"  The service wants a key, which a browser does not have by itself. {remedy}")
    ctx.say(f"  {clean(url)}")
    if not webbrowser.open(url):
        raise Stop("There is no browser here.", where="--open", remedy=f"Open {url} where there is one.")


def run_compare(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        found = []
        for given in args.jobs:
            job = dict(service.client.job(job_of(service, given)))
            has = "report" in mapping(job.get("links")) and job["status"] in ("succeeded", "failed")
            report = dict(service.client.report(str(job["id"]))) if has else None
            found.append((job, report))
    if ctx.json:
        ctx.emit({"items": [{"job": job, "report": report} for job, report in found]})
        return Exit.OK
    head = ("Job", "Model", "On", "Ships", "p50", "Speed-up [95 %]", "Rate", "Loss", "Size", "Memory", "Verdict")
    rows, styles = [], []
    for job, report in found:
        rows.append(_row(job, report or {}))
        styles.append(("green",) if verdict(job, report).exit == Exit.OK else ())
    ctx.screen.table(head, rows, left=(0, 1, 2, 3, 10), styles=styles, fit=3)
    return Exit.OK


def _row(job: Json, report: Json) -> list[str]:
    analysis, final = mapping(report.get("analysis")), mapping(report.get("final_metrics"))
    picked = report.get("picked")
    names = {c.get("id"): c.get("name") for c in report.get("candidates") or ()}
    ended = job.get("status") in ("succeeded", "failed", "cancelled")
    return [
        str(job.get("id")),
        str(analysis.get("model", figures.DASH)),
        str(analysis.get("hardware", figures.DASH)),
        "original" if picked == "baseline" else str(names.get(picked) or figures.DASH),
        figures.milliseconds(final.get("latency_ms")),
        speedup_of(report) if final else figures.DASH,
        figures.number(final.get("throughput_qps"), 3, "/s"),
        figures.percent(final.get("accuracy_loss_percent")),
        figures.megabytes(final.get("size_mb")),
        figures.megabytes(final.get("memory_mb")),
        verdict(job, report or None).word if ended else str(job.get("status")),
    ]
