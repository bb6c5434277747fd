"""`anneal bench`: a bundle's engine on this machine, called as its `infer.py` calls it, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal_client.cli import figures, values
from anneal_client.cli.context import Context
from anneal_client.cli.engines import unpack
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.reading import mapping

Json = dict[str, Any]
_START_S = 300.0

# Runs where the engine's library is, which need not be where the client is. One JSON line per batch size.
_SCRIPT = """
import importlib.util, json, sys, time
from pathlib import Path
import numpy as np
asked = json.loads(sys.argv[1])
folder = Path(asked["folder"])
spec = importlib.util.spec_from_file_location("infer", folder / "infer.py")
module = importlib.util.module_from_spec(spec)
sys.path.insert(0, str(folder))
spec.loader.exec_module(module)
begun = time.perf_counter()
names, run = module.load()
loaded = time.perf_counter() - begun
with np.load(asked["input"] or folder / "sample_input.npz", allow_pickle=False) as arrays:
    sample = {name: arrays[name] for name in arrays.files}
for batch in asked["batches"] or [None]:
    feeds = sample
    if batch is not None:
        feeds = {n: np.resize(a, (batch, *a.shape[1:])) if a.ndim else a for n, a in sample.items()}
    rows = batch or max((a.shape[0] for a in feeds.values() if a.ndim), default=1)
    try:
        run(feeds)
        warm = time.perf_counter()
        while time.perf_counter() - warm < min(0.5, asked["seconds"] / 4):
            run(feeds)
        took, end = [], time.perf_counter() + asked["seconds"]
        while time.perf_counter() < end or len(took) < 3:
            start = time.perf_counter()
            run(feeds)
            took.append(time.perf_counter() - start)
    except Exception as error:
        print(json.dumps({"batch": rows, "error": f"{type(error).__name__}: {error}"}), flush=True)
        continue
    p50, p90, p99 = (float(1000 * np.percentile(took, q)) for q in (50, 90, 99))
    p99 = p99 if len(took) >= 100 else None
    told = {"batch": rows, "calls": len(took), "load_seconds": loaded, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
    print(json.dumps({**told, "samples_per_second": 1000 * rows / p50}), flush=True)
"""


def add(commands: Any) -> None:
    parser = commands.add_parser("bench", help="time a bundle's engine on this machine")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the .zip, or the folder it was unpacked into")
    parser.add_argument("--batch", type=values.batches, metavar="N,M", help="the sample's rows repeated (as it is)")
    parser.add_argument("--seconds", type=values.measured, default=2.0, metavar="TIME", help="per batch size (2s)")
    parser.add_argument("--input", type=values.existing_file, metavar="NPZ", help="instead of the bundle's sample")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="that has the engine's library")
    parser.set_defaults(run=run)


def run(ctx: Context, args: argparse.Namespace) -> Exit:
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as temp:
        folder = _folder(args.bundle, Path(temp))
        rows = _timed(folder, args)
        told = _told_by_the_job(folder)
    if ctx.json:
        ctx.emit({"results": rows, "by_the_job": told})
    else:
        head = ("Batch", "p50", "p90", "p99", "Samples per second", "Calls", "p50 by the job")
        ctx.screen.table(head, [_row(row, told) for row in rows], left=())
        for row in rows:
            if "error" in row:
                ctx.screen.bullet(f"batch {row['batch']}: {row['error']}", "✗", "red")
    return Exit.REFUSED if any("error" in row for row in rows) else Exit.OK


def _row(row: Json, told: Mapping[str, Any]) -> list[str]:
    p50, p90, p99 = (figures.milliseconds(row.get(name)) for name in ("p50_ms", "p90_ms", "p99_ms"))
    rate, by_job = figures.number(row.get("samples_per_second")), told.get(str(row["batch"]))
    return [str(row["batch"]), p50, p90, p99, rate, figures.number(row.get("calls")), figures.milliseconds(by_job)]


def _folder(bundle: Path, temp: Path) -> Path:
    if not bundle.exists():
        remedy = "`anneal engines pull ENGINE` fetches one."
        raise Stop(f"There is no bundle {str(bundle)[:200]!r}.", where="BUNDLE", remedy=remedy, exit=Exit.USAGE)
    if bundle.is_file():
        unpack(bundle, temp / "bundle")
        bundle = temp / "bundle"
    if not (bundle / "infer.py").is_file():
        remedy = "Give a bundle of the kind python, as `anneal engines pull ENGINE` fetches it."
        raise Stop("There is no infer.py in it.", where=str(bundle), remedy=remedy)
    return bundle.resolve()


def _timed(folder: Path, args: argparse.Namespace) -> list[Json]:
    asked = {"folder": str(folder), "input": str(args.input.resolve()) if args.input else None}
    asked |= {"batches": args.batch, "seconds": args.seconds}
    command = [args.python, "-c", _SCRIPT, json.dumps(asked)]
    longest = _START_S + 3 * args.seconds * len(args.batch or [1])
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    requirements = folder / "requirements.txt"
    remedy = (
        f"Make an environment with what it needs: python -m venv env && env/bin/pip install -r {requirements}, and say "
        "--python env/bin/python."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=longest, check=False, env=environment)
    except OSError as error:
        raise Stop(f"{args.python} does not run: {error}", where="--python", remedy=remedy, exit=Exit.USAGE) from error
    except subprocess.TimeoutExpired:
        raise Stop(f"No end after {longest:.0f} s.", where=str(folder), remedy="Give fewer --seconds.") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Stop(f"The engine does not run: {lines[-1]}", where=str(folder / "infer.py"), remedy=remedy)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _told_by_the_job(folder: Path) -> dict[str, Any]:
    """p50 in ms by batch size, as it was measured on the worker's machine."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    figures_ = mapping(mapping(manifest).get("figures"))
    return {str(b): mapping(at).get("p50_ms") for b, at in mapping(figures_.get("batches")).items()}
