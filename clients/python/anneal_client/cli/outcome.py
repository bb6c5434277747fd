"""`anneal watch`, and the end of `anneal optimize --watch`: follow a job, show what came out, and exit by it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal_client import Event
from anneal_client.cli import values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, verdict
from anneal_client.cli.live import Live
from anneal_client.cli.reading import show_summary
from anneal_client.cli.screen import clean
from anneal_client.cli.service import Service
from anneal_client.cli.watch import follow
from anneal_client.errors import AnnealError, NotFound

Json = dict[str, Any]


def add(commands: Any) -> None:
    parser = commands.add_parser("watch", help="follow a job to its end; the exit code says what came out")
    parser.add_argument("job", metavar="JOB", type=values.job_id)
    parser.add_argument("--timeout", type=values.patience, metavar="TIME", help="exit 9 after it; the job goes on")
    parser.add_argument("--html", type=Path, metavar="FILE", help="keep the report's page")
    parser.add_argument("--out", type=Path, metavar="FILE", help="download the bundle")
    parser.set_defaults(run=run)


def run(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service(patient=True) as service:
        return conclude(ctx, service, args.job, timeout=args.timeout, html=args.html, out=args.out)


def conclude(
    ctx: Context, service: Service, job_id: str, *, timeout: float | None, html: Path | None, out: Path | None
) -> Exit:
    """Follow the job, then tell what became of it."""
    live = Live(ctx.screen, job_id)
    silent = ctx.json or ctx.quiet

    def hear(event: Event) -> None:
        if not silent:
            live(event)

    job = follow(service, job_id, hear, timeout, (lambda: None) if silent else live.tick)
    ctx.screen.wipe()
    report = report_of(service, job)
    found = verdict(job, report)
    kept: Json = {}
    if html is not None and report is not None:
        write(html, service.client.report_page(job_id))
        kept["html"] = str(html)
    engines = job.get("engine_ids") or []
    if out is not None and engines:
        service.client.download_bundle(engines[0], out)
        kept["bundle"] = str(out)
    if ctx.json:
        told = {"verdict": found.word, "detail": found.sentence, "exit_code": int(found.exit), **kept}
        ctx.emit({**told, "job": job, "report": report})
        return found.exit
    if not ctx.quiet:
        show_end(ctx, job, report, found.exit, found.sentence)
        for what, path in kept.items():
            ctx.say(f"{what}: {clean(path)}")
    return found.exit


def report_of(service: Service, job: Mapping[str, Any]) -> Json | None:
    """None where the job left none."""
    if job.get("status") not in ("succeeded", "failed"):
        return None
    with contextlib.suppress(NotFound):
        return service.client.report(str(job["id"]))
    return None


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        remedy = "Give a file in a folder that is there and can be written."
        raise AnnealError("not_written", f"{path}: {error.strerror}", remedy=remedy) from error


def show_end(ctx: Context, job: Mapping[str, Any], report: Json | None, exit: Exit, sentence: str) -> None:
    screen = ctx.screen
    style = ("bold", "green") if exit == Exit.OK else ("bold", "yellow") if exit == Exit.NOT_FASTER else ("bold", "red")
    screen.line(f"  {screen.paint(clean(sentence), *style)}")
    error = job.get("error")
    if isinstance(error, Mapping):
        named = [f"{name} {error[name]}" for name in ("stage", "node", "tensor") if error.get(name)]
        screen.line(f"  {clean(error.get('code', ''))}" + (f", in {clean(', '.join(named))}" if named else ""))
        if error.get("remedy"):
            screen.bullet(str(error["remedy"]), "→")
    if report is not None:
        show_summary(screen, report)
    hints = ["`anneal engines pull {}` fetches the engine"] if job.get("engine_ids") else []
    hints += ["`anneal report {}` tells everything"] if report is not None else []
    if hints:
        screen.line()
        screen.line(f"  {', '.join(hint.format(clean(job['id'])) for hint in hints)}.")
