"""`anneal optimize`: from options to a job's spec, to the job, and with --watch to its verdict."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal_client.cli import figures, upload, values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.outcome import conclude
from anneal_client.cli.screen import clean
from anneal_client.cli.service import Service

Json = dict[str, Any]
OBJECTIVES = ("latency", "throughput", "cost")
TRAINING = ("off", "auto", "always")
DEPLOY = ("merged", "ensemble")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


def add(commands: Any) -> None:
    parser = commands.add_parser("optimize", help="optimize a model; with --watch, wait for what comes out")
    parser.add_argument("model", metavar="MODEL", help=".onnx, .pt2, an archive of one, or the id of an uploaded model")
    chain = parser.add_argument_group("a chain: further models, optimized with MODEL as one")
    chain.add_argument(
        "--then", metavar="MODEL", action="append", help="that the outputs go to; as often as there are models"
    )
    chain.add_argument(
        "--connect",
        metavar="INPUT=OUTPUT",
        type=values.joint,
        action=_Connect,
        help="of the --then before it: its input, the output that goes there (those of one name)",
    )
    chain.add_argument("--deploy", choices=DEPLOY, help="one engine of the whole (merged), or one of each model")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="NPZ", help="calibrates and judges: split sample by sample (file or id)")
    data.add_argument("--calibration", metavar="NPZ", help="calibrates only")
    data.add_argument("--validation", metavar="NPZ", help="judges only")
    promise = parser.add_argument_group("what must be kept")
    promise.add_argument("--max-loss", type=values.percent, metavar="PERCENT", help="of the metric, as 1%%")
    promise.add_argument("--metric", help="how accuracy is judged (auto: by what the data hold)")
    promise.add_argument("--confidence", type=values.confidence_percent, metavar="PERCENT", help="of the proof (95%%)")
    promise.add_argument("--strict", action="store_true", help="refuse what is within the limit but not proven to be")
    promise.add_argument("--p99", type=values.milliseconds, metavar="TIME", help="99 of 100 calls, as 20ms")
    promise.add_argument("--throughput", type=values.per_second, metavar="RATE", help="samples per second, at least")
    promise.add_argument("--max-memory", type=values.megabytes, metavar="SIZE", help="as 500MB")
    promise.add_argument("--max-size", type=values.megabytes, metavar="SIZE", help="of the engine's file, as 20MB")
    how = parser.add_argument_group("how")
    how.add_argument("--objective", choices=OBJECTIVES, help="what is to be best (latency)")
    how.add_argument("--price", type=values.price, metavar="P", help="of one machine per hour, for the objective cost")
    how.add_argument("--on", type=values.target, metavar="TARGET", help="cpu, cuda, 8.9 (a GPU's), or a hardware id")
    how.add_argument("--backend", type=values.names, metavar="A,B", help="inference libraries that may be used")
    how.add_argument(
        "--precision", type=values.one_of("precision", *PRECISIONS), metavar="P,Q", help="that may be tried"
    )
    how.add_argument("--train", choices=TRAINING, help="weights learn to be rounded to int8, of a .pt2")
    how.add_argument("--batch", type=values.batches, metavar="N,M", help="batch sizes that are measured (1,8)")
    how.add_argument("--shape", type=values.shape, action="append", metavar="IN=RANGE", help="x=1x3x32x32:8x…:32x…")
    how.add_argument("--budget", type=values.budget, metavar="TIME", help="10s to 24h (15m)")
    how.add_argument("--min-seconds", type=values.measured, metavar="TIME", help="measured per engine and batch size")
    how.add_argument("--measure-again", action="store_true", help="take no timing from an earlier job")
    how.add_argument("--allow-noisy", action="store_true", help="let what looks fastest ship from a busy machine")
    how.add_argument("--webhook", metavar="URL", help="told of the job's end")
    how.add_argument("--spec", type=values.existing_file, metavar="FILE", help="further fields of the job, as JSON")
    how.add_argument("--name", help="of the model, in lists and reports (its file's name)")
    how.add_argument(
        "--idempotency-key",
        type=values.idempotency_key,
        metavar="KEY",
        help="the same key and options answer the same job",
    )
    after = parser.add_argument_group("then")
    after.add_argument("--watch", action="store_true", help="follow it to the end; the exit code says what came out")
    after.add_argument("--timeout", type=values.patience, metavar="TIME", help="with --watch: exit 9 after it")
    after.add_argument("--html", type=Path, metavar="FILE", help="with --watch: keep the report's page")
    after.add_argument("--out", type=Path, metavar="FILE", help="with --watch: download the bundle")
    parser.set_defaults(run=run)


def run(ctx: Context, args: argparse.Namespace) -> Exit:
    _check(args)
    spec = spec_of(args)
    _require_files(args)
    with ctx.service(patient=args.watch) as service:
        ctx.busy(f"uploading {args.model}")
        found = upload.model(service, args.model, args.name)
        ctx.say(f"model  {clean(found['id'])}  {clean(found['name'])}, {figures.size(found.get('size_bytes'))}")
        _add_models(ctx, service, args, spec)
        _add_data(ctx, service, args, spec)
        job = service.client.submit({**spec, "model_id": found["id"]}, idempotency_key=args.idempotency_key)
        ctx.say(f"job    {clean(job['id'])}")
        if args.watch:
            return conclude(ctx, service, str(job["id"]), timeout=args.timeout, html=args.html, out=args.out)
    if ctx.json:
        ctx.emit(job)
    else:
        ctx.say(f"`anneal watch {job['id']}` shows how it goes, `anneal report {job['id']}` what came out.")
    return Exit.OK


class _Connect(argparse.Action):
    """Joints by the place of the `--then` that they stand behind."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        joint: Any,
        option_string: str | None = None,  # noqa: ARG002  (argparse gives it)
    ) -> None:
        links = namespace.then or []
        if not links:
            parser.error("argument --connect: give the --then that it is of before it")
        found: dict[int, dict[str, str]] = {**(namespace.connect or {})}
        found[len(links) - 1] = {**found.get(len(links) - 1, {}), joint[0]: joint[1]}
        namespace.connect = found


def _check(args: argparse.Namespace) -> None:
    if args.data and (args.calibration or args.validation):
        remedy = "Give either --data, which is split, or --calibration and --validation."
        raise Stop("--data calibrates and judges already.", where="--data", remedy=remedy, exit=Exit.USAGE)
    if not args.watch:
        for name in ("timeout", "html", "out"):
            if getattr(args, name) is not None:
                remedy = "Add --watch, or use `anneal watch`, `anneal report` and `anneal engines pull` later."
                raise Stop("It is for --watch.", where=f"--{name}", remedy=remedy, exit=Exit.USAGE)


def _require_files(args: argparse.Namespace) -> None:
    """Before a large model has gone up for nothing."""
    upload.require("mdl", args.model, "MODEL")
    for given in args.then or ():
        upload.require("mdl", given, "--then")
    for name in ("data", "calibration", "validation"):
        if (given := getattr(args, name)) is not None:
            upload.require("dst", given, f"--{name}")


def _add_models(ctx: Context, service: Service, args: argparse.Namespace, spec: Json) -> None:
    """Upload the models of the chain behind the first one."""
    links: list[Json] = []
    for place, given in enumerate(args.then or ()):
        ctx.busy(f"uploading {given}")
        found = upload.model(service, given, None)
        ctx.say(f"then   {clean(found['id'])}  {clean(found['name'])}, {figures.size(found.get('size_bytes'))}")
        joints = (args.connect or {}).get(place)
        links.append({"model_id": found["id"], **({"connect": joints} if joints else {})})
    if links:
        spec["chain"] = {**(spec.get("chain") or {}), "then": links}


def _add_data(ctx: Context, service: Service, args: argparse.Namespace, spec: Json) -> None:
    """Upload the data; what calibrates and judges alike is sent once."""
    sections = [("data", "calibration"), ("calibration", "calibration"), ("validation", "validation")]
    for option, section in sections:
        given = getattr(args, option)
        if given is None:
            continue
        ctx.busy(f"uploading {given}")
        found = upload.dataset(service, given)
        told = f"{clean(found['name'])}, {figures.number(found.get('samples'))} samples"
        ctx.say(f"data   {clean(found['id'])}  {told}")
        spec[section] = {**(spec.get(section) or {}), "dataset_id": found["id"]}
        if option == "data":
            spec["validation"] = {**(spec.get("validation") or {}), "dataset_id": found["id"]}


def spec_of(args: argparse.Namespace) -> Json:
    """The job's spec without what has to be uploaded first; options win over --spec."""
    spec = _read_spec(args.spec) if args.spec else {}
    told: dict[str, Json] = {
        "validation": {
            "max_accuracy_loss_percent": args.max_loss,
            "metric": args.metric,
            "confidence": None if args.confidence is None else args.confidence / 100,
            "strict": args.strict or None,
        },
        "constraints": {
            "p99_latency_ms": args.p99,
            "min_throughput_qps": args.throughput,
            "max_memory_mb": args.max_memory,
            "max_size_mb": args.max_size,
        },
        "target": {**(args.on or {}), "backends": args.backend},
        "benchmark": {
            "batch_sizes": args.batch,
            "min_seconds": args.min_seconds,
            "allow_noisy": args.allow_noisy or None,
        },
        "shapes": dict(args.shape or ()),
        "cost": {"price_per_hour": args.price},
        "webhook": {"url": args.webhook},
        "chain": {"deploy": args.deploy},
    }
    for name, fields in told.items():
        given = {k: v for k, v in fields.items() if v is not None}
        if given:
            spec[name] = {**(spec.get(name) or {}), **given}
    if args.train is not None:
        how = spec.get("quantization") or {}
        spec["quantization"] = {**how, "training": {**(how.get("training") or {}), "mode": args.train}}
    plain = {
        "objective": args.objective,
        "precisions": args.precision,
        "budget_seconds": None if args.budget is None else round(args.budget),
        "measure": "again" if args.measure_again else None,
    }
    return {**spec, **{k: v for k, v in plain.items() if v is not None}}


def _read_spec(path: Path) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Stop(f"It is no JSON: {error}", where=f"--spec {path}", remedy=_SPEC, exit=Exit.USAGE) from error
    if not isinstance(found, Mapping):
        raise Stop("It holds no JSON object.", where=f"--spec {path}", remedy=_SPEC, exit=Exit.USAGE)
    return dict(found)


_SPEC = 'Write the fields of a job as docs/api.md has them, for example {"search": {"strategy": "exhaustive"}}.'
