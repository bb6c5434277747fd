"""`anneal engines`: list what was delivered, fetch it, unpacked where wanted."""

from __future__ import annotations

import argparse
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from anneal_client import Client
from anneal_client.cli import figures, values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.listing import limited, listed
from anneal_client.cli.reports import job_or_engine
from anneal_client.cli.screen import clean
from anneal_client.cli.service import Service

Json = dict[str, Any]
KINDS = ("python", "triton", "kserve")


def add(commands: Any) -> None:
    parser = commands.add_parser("engines", help="list delivered engines; `engines pull` fetches one")
    limited(parser)
    parser.set_defaults(run=list_engines)
    pull = commands.below(parser, "{pull}").add_parser("pull", help="download the bundle of an engine, verified")
    pull.add_argument("engine", metavar="ENGINE|JOB", type=job_or_engine)
    pull.add_argument("-o", "--output", type=Path, metavar="PATH", help="file, or with --unpack the folder")
    pull.add_argument("--kind", choices=KINDS, default="python", help="of bundle (python)")
    pull.add_argument(
        "--then",
        metavar="ENGINE|JOB",
        type=job_or_engine,
        help="of the kind triton: where its output goes, as an ensemble",
    )
    pull.add_argument(
        "--connect",
        metavar="INPUT=OUTPUT",
        type=values.joint,
        action="append",
        help="of --then: its input, this one's output",
    )
    pull.add_argument("--unpack", action="store_true", help="into a folder, which must not be there yet")
    pull.add_argument("--engine-only", action="store_true", help="the engine's file, without what runs it")
    pull.set_defaults(run=run_pull)


def list_engines(ctx: Context, args: argparse.Namespace) -> Exit:
    head = ("Engine", "Backend", "Precision", "Speed-up", "Size", "Made", "Job", "Machine")
    listed(ctx, args, Client.engines, head, lambda e: [
        str(e.get("id")), str(e.get("backend")), str(e.get("precision")),
        str((e.get("metrics") or {}).get("speedup") or figures.DASH), figures.size(e.get("size_bytes")),
        figures.when(e.get("created_at")), str(e.get("job_id")), str((e.get("hardware") or {}).get("id", figures.DASH)),
    ])  # fmt: skip
    return Exit.OK


def run_pull(ctx: Context, args: argparse.Namespace) -> Exit:
    if args.unpack and args.engine_only:
        raise Stop(
            "An engine's file has nothing to unpack.", where="--unpack", remedy="Leave one out.", exit=Exit.USAGE
        )
    if args.then and (args.kind != "triton" or args.engine_only):
        what = "Two engines make one model in Triton only."
        raise Stop(what, where="--then", remedy="Add --kind triton.", exit=Exit.USAGE)
    with ctx.service(patient=True) as service:
        engine = _engine(service, args.engine)
        if args.engine_only:
            target = args.output or Path(_plain(engine["filename"]))
            service.client.download_engine(engine["id"], target)
        else:
            target = _pull(service, engine, args)
    if ctx.json:
        ctx.emit({"path": str(target), "engine": engine})
    else:
        ctx.say(f"  {clean(target)}")
        if args.unpack and args.kind == "python":
            ctx.say(f"  Run it: pip install -r {clean(target)}/requirements.txt && python {clean(target)}/infer.py")
    return Exit.OK


def _engine(service: Service, given: str) -> Json:
    if given.startswith("job_"):
        job = service.client.job(given)
        ids = job.get("engine_ids") or []
        if not ids:
            what = f"The job is {job['status']} and has no engine."
            remedy = f"`anneal job {given}` tells why; `anneal watch {given}` waits for it."
            raise Stop(what, where=given, remedy=remedy, exit=Exit.REFUSED)
        given = str(ids[0])
    return dict(service.client.engine(given))


def _pull(service: Service, engine: Json, args: argparse.Namespace) -> Path:
    ending = ".zip" if args.kind == "python" else ".tar"
    name = Path(_plain(engine["bundle_filename"]))
    kind = None if args.kind == "python" else args.kind
    asked: Json = {"kind": kind}
    if args.then:
        asked |= {"then": _engine(service, args.then)["id"], "connect": dict(args.connect or ())}
    if not args.unpack:
        stem = name.stem if kind is None else f"{name.stem}-{kind}"
        target: Path = args.output or Path(f"{stem}{ending}")
        service.client.download_bundle(engine["id"], target, **asked)
        return target
    folder: Path = args.output or Path(name.stem if kind is None else f"{name.stem}-{kind}")
    if folder.exists():
        remedy = "Give another folder with -o, or remove this one."
        raise Stop(f"The folder {folder} is there already.", where="--unpack", remedy=remedy, exit=Exit.USAGE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".anneal-") as temp:
        archive = Path(temp) / f"bundle{ending}"
        service.client.download_bundle(engine["id"], archive, **asked)
        unpack(archive, Path(temp) / "unpacked")
        shutil.move(Path(temp) / "unpacked", folder)
    return folder


def _plain(name: Any) -> str:
    """A name of the service as one of a file here: no folder, nothing that a terminal or a shell would obey."""
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in str(name))
    return kept.lstrip(".") or "bundle"


def unpack(archive: Path, folder: Path) -> None:
    """A .zip or .tar; nothing lands outside of the folder."""
    folder.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(folder)  # drops absolute paths and ".." by itself
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except tarfile.ReadError as error:  # whose text tells of each way to compress
        remedy = "Give the file that `anneal engines pull` wrote, or fetch it again."
        raise Stop("It is no bundle: neither a .zip nor a .tar.", where=str(archive), remedy=remedy) from error
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
        remedy = "Fetch it again with `anneal engines pull`."
        raise Stop(f"It is no bundle: {error}", where=str(archive), remedy=remedy) from error
