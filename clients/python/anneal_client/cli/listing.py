"""Lists and single things: jobs, models, data sets, engines, what the service offers."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from anneal_client import Client
from anneal_client.cli import figures, values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit
from anneal_client.cli.reading import mapping, objects
from anneal_client.cli.screen import Screen, clean

Json = dict[str, Any]
Row = Callable[[Json], Sequence[str]]
_STATUS = {"succeeded": ("green",), "failed": ("red",), "running": ("cyan",), "cancelled": ("dim",)}
STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")


def add(commands: Any) -> None:
    jobs = commands.add_parser("jobs", help="list jobs, newest first")
    jobs.add_argument("--status", choices=STATUSES)
    jobs.add_argument("--model", metavar="ID", type=values.identifier("mdl", "model"), help="of this model only")
    jobs.set_defaults(run=list_jobs)
    models = commands.add_parser("models", help="list uploaded models")
    models.set_defaults(run=list_models)
    datasets = commands.add_parser("datasets", help="list uploaded data sets")
    datasets.set_defaults(run=list_datasets)
    for parser in (jobs, models, datasets):
        limited(parser)
    job = commands.add_parser("job", help="one job: how far it is, what it did")
    job.add_argument("job", metavar="JOB", type=values.job_id)
    job.set_defaults(run=show_job)
    cancel = commands.add_parser("cancel", help="end jobs")
    cancel.add_argument("jobs", metavar="JOB", nargs="+", type=values.job_id)
    cancel.set_defaults(run=cancel_jobs)
    offer = commands.add_parser("capabilities", help="what live workers offer")
    offer.set_defaults(run=capabilities)


def limited(parser: argparse.ArgumentParser) -> None:
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--limit", type=values.count, default=20, metavar="N", help="at most so many (20)")
    many.add_argument("--all", action="store_true", help="all of them")


def listed(
    ctx: Context, args: argparse.Namespace, ask: Callable[[Client], Iterator[Json]], head: Sequence[str], row: Row
) -> list[Json]:
    """Show a list, and say where there is more."""
    most = None if args.all else args.limit
    with ctx.service() as service:
        found = list(itertools.islice(ask(service.client), None if most is None else most + 1))
    more = most is not None and len(found) > most
    found = found if most is None else found[:most]
    if ctx.json:
        ctx.emit({"items": found, "more": more})
    elif not found:
        ctx.say("  none")
    else:
        rows = [list(row(item)) for item in found]
        styles = [_STATUS.get(str(item.get("status")), ()) for item in found]
        left = [i for i, name in enumerate(head) if name not in ("Size", "Samples", "Progress", "Took")]
        ctx.screen.table(head, rows, left=left, styles=styles, fit=head.index("Name") if "Name" in head else None)
        if more:
            ctx.say(f"  … there are more: --limit {2 * args.limit} or --all")
    return found


def list_jobs(ctx: Context, args: argparse.Namespace) -> Exit:
    head = ("Job", "Status", "Progress", "Stage", "Made", "Took", "Model", "Engine")
    listed(ctx, args, lambda client: client.jobs(status=args.status, model_id=args.model), head, _job_row)
    return Exit.OK


def _job_row(job: Json) -> Sequence[str]:
    took = figures.between(job.get("started_at"), job.get("finished_at"))
    progress = (
        figures.number(100 * job["progress"], 3, " %") if figures.is_number(job.get("progress")) else figures.DASH
    )
    engines = job.get("engine_ids") or [figures.DASH]
    shown = [job.get("id"), job.get("status"), progress, job.get("stage") or "", figures.when(job.get("created_at"))]
    return [*map(str, shown), figures.duration(took), str(job.get("model_id")), str(engines[0])]


def list_models(ctx: Context, args: argparse.Namespace) -> Exit:
    head = ("Model", "Name", "Format", "Size", "Inputs", "Made")
    listed(ctx, args, Client.models, head, lambda m: [
        str(m.get("id")), str(m.get("name")), str(m.get("format")), figures.size(m.get("size_bytes")),
        tensors(m.get("inputs")), figures.when(m.get("created_at")),
    ])  # fmt: skip
    return Exit.OK


def list_datasets(ctx: Context, args: argparse.Namespace) -> Exit:
    head = ("Data set", "Name", "Samples", "Size", "Arrays", "Made")
    listed(ctx, args, Client.datasets, head, lambda d: [
        str(d.get("id")), str(d.get("name")), figures.number(d.get("samples")), figures.size(d.get("size_bytes")),
        tensors(d.get("arrays")), figures.when(d.get("created_at")),
    ])  # fmt: skip
    return Exit.OK


def tensors(found: Any) -> str:
    """As "x float32[batch,3,224,224]"."""
    shown = []
    for tensor in objects(found):
        shape = tensor.get("shape")
        dims = "?" if shape is None else ",".join("?" if d is None else str(d) for d in shape)
        shown.append(f"{tensor.get('name')} {tensor.get('dtype')}[{dims}]")
    return ", ".join(shown[:4]) + (f", … {len(shown) - 4} more" if len(shown) > 4 else "")


def show_job(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        job = dict(service.client.job(args.job))
    if ctx.json:
        ctx.emit(job)
        return Exit.OK
    screen = ctx.screen
    status = str(job.get("status"))
    screen.line(f"  {clean(job['id'])}  {screen.paint(clean(status), *_STATUS.get(status, ()))}")
    took = figures.between(job.get("started_at"), job.get("finished_at"))
    facts = {
        "progress": f"{figures.bar(job.get('progress'))} {100 * float(job.get('progress') or 0):.0f} %",
        "stage": job.get("stage"),
        "made": figures.when(job.get("created_at")),
        "took": figures.duration(took) if took is not None else None,
        "expected end": figures.when(job["expected_end"]) if job.get("expected_end") else None,
        "model": job.get("model_id"),
        "objective": mapping(job.get("spec")).get("objective"),
        "engine": ", ".join(map(str, job.get("engine_ids") or ())) or None,
    }
    for name, value in facts.items():
        if value:
            screen.line(f"  {name:<13} {clean(value)}")
    _show_error(screen, job.get("error"))
    _show_stages(screen, objects(job.get("stages")))
    return Exit.OK


def _show_error(screen: Screen, error: Any) -> None:
    if not isinstance(error, Mapping):
        return
    screen.line(
        f"  {screen.paint(clean(error.get('code', 'failed')), 'bold', 'red')}: {clean(error.get('detail', ''))}"
    )
    for name in ("stage", "node", "tensor", "remedy"):
        if error.get(name):
            screen.line(f"  {name:<13} {clean(error[name])}")


def _show_stages(screen: Screen, stages: Sequence[Mapping[str, Any]]) -> None:
    if not stages:
        return
    rows = []
    for stage in stages:
        took = "from cache" if stage.get("cached") else figures.duration(stage.get("seconds"))
        told = [stage.get("name"), stage.get("candidate") or stage.get("hardware") or "", stage.get("status")]
        rows.append([*map(str, told), took, str(stage.get("detail") or "")])
    screen.line()
    screen.table(("Stage", "Of", "Status", "Took", ""), rows, left=(0, 1, 2, 4), fit=4)


def cancel_jobs(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        found = [dict(service.client.cancel(job_id)) for job_id in args.jobs]
    if ctx.json:
        ctx.emit({"items": found})
        return Exit.OK
    for job in found:
        ended = job["status"] in ("succeeded", "failed", "cancelled")
        ctx.say(f"  {clean(job['id'])}  {clean(job['status']) if ended else 'will be cancelled'}")
    return Exit.OK


def capabilities(ctx: Context, _: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        found = dict(service.client.capabilities())
    if ctx.json:
        ctx.emit(found)
        return Exit.OK
    for name in ("hardware", "devices", "precisions", "formats"):
        ctx.say(f"  {name:<11} {clean(', '.join(map(str, found.get(name) or ())) or 'none')}")
    workers = objects(found.get("workers"))
    if not workers:
        ctx.say("  No worker is live: `anneal serve` runs one beside the API, `python -m workers` one more.")
        return Exit.OK
    rows = []
    for worker in workers:
        hardware = mapping(worker.get("hardware"))
        for backend in objects(worker.get("backends")) or [{}]:
            versions = ", ".join(f"{k} {v}" for k, v in mapping(backend.get("versions")).items())
            told = [worker.get("hostname"), hardware.get("id"), backend.get("name", figures.DASH)]
            rows.append([*map(str, told), ", ".join(map(str, backend.get("precisions") or ())), versions])
    ctx.screen.line()
    ctx.screen.table(("Worker", "Hardware", "Backend", "Precisions", "Versions"), rows, left=range(5), fit=4)
    return Exit.OK
