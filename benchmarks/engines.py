"""Anneal beside the other tools on eighteen architectures: latency, accuracy, time to result.

    python benchmarks/engines.py --models digits,digits_mobile      # minutes; all models: hours
    python benchmarks/engines.py --reuse --models bert              # what was made before is measured again, not made
    python benchmarks/engines.py --summary                          # the tables, from the JSON alone

Each tool makes its engine as its documentation says (`peers/make.py`), in a process of its own; Anneal by a job over
HTTP on a fresh `python -m app serve`, whose downloaded bundle is then run by its own `infer.py`. All engines of a model
are then timed in turns by one loop (`peers/runner.py`) and judged by one judge (`peers/judge.py`). Results are merged
into the JSON model by model, so that a run can be split. A tool that fails is a row with its reason.

Goals: at or below 1.02 × the best peer that keeps the same accuracy (loss ≤ 1 %), on every model and batch size; the
geometric mean of the ratios to ONNX Runtime's default at most 0.9 × the best single tool's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _engines_summary as tables
import numpy as np
from _common import HERE, CannotMeasure, deployment, execute, machine, parser, say, scratch
from make_models import NAMES, Case, case
from peers import anneal, contest, judge
from peers.make import FOR_TRANSFORMERS, LABELS, PEERS

from anneal_client import AnnealError, Client, Event
from workers.measure.stats import ratio_of_medians

CACHE = HERE / ".cache"
ENGINES = CACHE / "engines"
OLIVE = CACHE / "olive-venv"
OLIVE_PACKAGES = ("olive-ai==0.13.0", "onnxruntime", "requests", "pandas")
BATCHES = (1, 8)

Json = dict[str, Any]


# Making


def chosen_peers(arguments: argparse.Namespace, files: Case) -> list[str]:
    """ONNX Runtime's default is always there: it is the reference of every ratio and of the accuracy."""
    asked = arguments.peers.split(",") if arguments.peers else [*LABELS]
    unknown = set(asked) - set(LABELS)
    if unknown:
        raise CannotMeasure(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(LABELS)}")
    kept = [n for n in LABELS if n in asked or n == tables.BASELINE]
    if arguments.skip_olive:
        kept = [n for n in kept if not n.startswith("olive")]
    return [n for n in kept if files.transformer or n not in FOR_TRANSFORMERS]


def olive_python() -> Path:
    """Olive's interpreter, in an environment of its own: its requirements are not this project's."""
    python = OLIVE / "bin" / "python"
    if not (OLIVE / "bin" / "olive").exists():
        say("  an environment for Olive (about 6 GB, minutes) …")
        subprocess.run([sys.executable, "-m", "venv", str(OLIVE)], check=True)
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", *OLIVE_PACKAGES], check=False)
        if done.returncode:
            raise CannotMeasure("Olive cannot be installed (--skip-olive goes on without it)")
    return python


def make_peer(name: str, files: Case, folder: Path, limit_s: float) -> Json:
    """Run the tool; answers its engine, or `error`, and the wall seconds."""
    task = {
        "peer": name,
        "model": str(files.model),
        "calibration": str(files.calibration),
        "transformer": files.transformer,
        "axes": dict(files.axes),
        "out": str(folder),
        "olive": str(olive_python()) if name.startswith("olive") else None,
    }
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, str(HERE / "peers" / "make.py"), str(folder / "task.json")]
    started = time.perf_counter()
    with (folder / "log.txt").open("wb") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, cwd=folder, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not ready within {limit_s:.0f} s", "seconds": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    if done.returncode:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        return {"error": (lines[-1] if lines else f"ended with {done.returncode}")[:300], "seconds": seconds}
    return {**json.loads((folder / "engine.json").read_text()), "seconds": seconds}


def make_anneal(files: Case, folder: Path, arguments: argparse.Namespace) -> Json:
    """Run the job and fetch its bundle; the report is kept beside it."""

    def note(event: Event) -> None:
        if line := anneal.short(event):
            say(line)

    benchmark = {"batch_sizes": list(BATCHES), "min_seconds": arguments.job_seconds}
    with scratch(arguments.folder, 4 << 30) as home, deployment(home) as service, Client(service.url) as client:
        try:
            job, report, seconds = anneal.run_job(
                client, files, note, benchmark=benchmark, budget_seconds=arguments.budget
            )
            spec = anneal.fetch_bundle(client, job, folder)
        except (anneal.JobEnded, AnnealError) as failure:
            return {"error": str(failure)[:500]}
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return {**spec, "seconds": seconds}


def engine_of(name: str, files: Case, arguments: argparse.Namespace) -> Json:
    """What the tool made of the model, now or, with --reuse, before."""
    folder = ENGINES / files.name / name
    kept = folder / "result.json"
    if arguments.reuse and kept.exists():
        found: Json = json.loads(kept.read_text())
        if found.get("of") == str(files.model):
            return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"  {LABELS[name]} …")
    if name == tables.ANNEAL:
        found = make_anneal(files, folder, arguments)
    else:
        found = make_peer(name, files, folder, arguments.limit)
    found["of"] = str(files.model)
    say(f"  {LABELS[name]}: {found.get('error') or 'made'} ({found.get('seconds') or 0:.0f} s)")
    kept.write_text(json.dumps(found, indent=1))
    return found


# Measuring


def compare(files: Case, made: Mapping[str, Json], arguments: argparse.Namespace) -> dict[str, Json]:
    """Time and judge all that were made; one entry per tool."""
    with np.load(files.validation) as arrays:
        labels = arrays["labels"] if "labels" in arrays.files else None
    specs = {n: e for n, e in made.items() if "error" not in e}
    with scratch(arguments.folder) as folder:
        found = contest.measure(specs, files.validation, folder, BATCHES, arguments.seconds, files.axes)
    reference = found[tables.BASELINE]
    if "error" in reference:
        raise CannotMeasure(f"{files.label} does not run on ONNX Runtime: {reference['error']}")
    entries: dict[str, Json] = {}
    for name, spec in made.items():
        result = found.get(name, {"error": spec.get("error")})
        entry: Json = {"seconds": spec.get("seconds"), "error": result.get("error")}
        entry["facts"] = {**spec.get("facts", {}), **result.get("facts", {})}
        if "outputs" in result:
            entry["accuracy"] = judge.loss(files.judge, reference["outputs"], result["outputs"], labels)
        if not entry["error"]:
            rounds = result["rounds"]
            entry["batches"] = {str(b): contest.figures(rounds[b], reference["rounds"][b]) for b in BATCHES}
        entries[name] = entry
    own = entries.get(tables.ANNEAL, {})
    if own.get("batches"):
        own["versus_best"] = {}
        for batch in BATCHES:
            if best := tables.best_peer(entries, str(batch)):
                rounds = (found[n]["rounds"][batch] for n in (tables.ANNEAL, best[0]))
                own["versus_best"][str(batch)] = ratio_of_medians(*rounds).to_json()
    return entries


def one_model(name: str, arguments: argparse.Namespace) -> Json:
    files = case(name)
    say(f"{files.label} …")
    made = {peer: engine_of(peer, files, arguments) for peer in chosen_peers(arguments, files)}
    say("  side by side …")
    return {
        "label": files.label,
        "weights": files.weights,
        "size_mb": round(files.model.stat().st_size / 1e6, 1),
        "metric": files.metric,
        "machine": machine(),
        "seconds_per_engine_and_batch": arguments.seconds,
        "engines": compare(files, made, arguments),
    }


def merge(path: Path, name: str, entry: Json) -> Json:
    """Put one model's figures into the file; answers the whole."""
    whole: Json = json.loads(path.read_text()) if path.exists() else {"models": {}}
    whole["models"][name] = entry
    order = [n for n in NAMES if n in whole["models"]]
    whole["models"] = {n: whole["models"][n] for n in order}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def measure(arguments: argparse.Namespace) -> Json:
    if arguments.summary:
        if not arguments.out.exists():
            raise CannotMeasure(f"there is no {arguments.out} yet")
        whole = json.loads(arguments.out.read_text())
        for entry in whole["models"].values():
            print(f"### {entry['label']}, {entry['size_mb']} MB\n\n{tables.model_table(entry)}\n")
    else:
        whole = {"models": {}}
        for name in arguments.models.split(",") if arguments.models else NAMES:
            if name not in NAMES:
                raise CannotMeasure(f"no such model: {name}; there are {', '.join(NAMES)}")
            entry = one_model(name, arguments)
            whole = merge(arguments.out, name, entry)
            print(f"### {entry['label']}, {entry['size_mb']} MB\n\n{tables.model_table(entry)}\n", flush=True)
    print(tables.summary(whole["models"]))
    return whole


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", help=f"some of {','.join(NAMES)} (default: all)")
    options.add_argument("--peers", help=f"some of {','.join([*PEERS, tables.ANNEAL])} (default: all that fit)")
    options.add_argument("--skip-olive", action="store_true", help="without its environment of 6 GB")
    options.add_argument("--seconds", type=float, default=6, help="measured per engine and batch size")
    options.add_argument("--budget", type=int, default=600, help="budget_seconds of Anneal's jobs")
    options.add_argument("--job-seconds", type=float, default=3, help="benchmark.min_seconds of Anneal's jobs")
    options.add_argument("--limit", type=float, default=900, help="seconds that a peer may take to make its engine")
    options.add_argument("--reuse", action="store_true", help="keep the engines that were made before")
    options.add_argument("--summary", action="store_true", help="print the tables from --out, measure nothing")
    options.add_argument("--out", type=Path, default=CACHE / "engines.json", help="JSON that results are merged into")
    execute(measure, options.parse_args())
