"""From an uploaded model to a proven engine, in front of your eyes.

    python examples/digits/demo.py                 # starts a service of its own and stops it again
    python examples/digits/demo.py --url http://…  # uses one that runs

Needs the service's `cpu` extra and the client (`clients/python`) in the environment; `make demo` sees to both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from beside import EngineFailed, Process, beside
from service import Service, ServiceFailed, free_port
from view import Progress, Screen, clean, interval, number, shipped_speedups, show_report, table

from anneal_client import AnnealError, Client, JobFailed

HERE = Path(__file__).resolve().parent
BATCH_SIZES = (1, 8)
# By where their memory lies, mostly; the job measures the original against itself in two of them (its A/A).
PROCESSES_DIFFER = 1.05
# The demo shall be short: the best so far ships when the first one runs out. A machine that is too busy for anything to
# be compared in it gets the second.
BUDGETS_S = (14, 60)


class DemoFailed(Exception):
    """The demo cannot go on, or what came out is not what was promised."""


def optimize(screen: Screen, client: Client, min_seconds: float) -> dict[str, Any]:
    """Upload, submit, watch; answers the job that succeeded."""
    screen.title("Upload")
    model = client.upload_model(HERE / "model.onnx", "digits")
    calibration = client.upload_dataset(HERE / "calibration.npz", "digits-calibration")
    validation = client.upload_dataset(HERE / "validation.npz", "digits-validation")
    size = f"{(HERE / 'model.onnx').stat().st_size / 1e6:.2f} MB"
    screen.line(
        f"  model        {clean(model['id'])}  {size}, opset {model.get('opset', '–')}, sha256 {model['sha256'][:12]}…"
    )
    screen.line(f"  calibration  {clean(calibration['id'])}")
    screen.line(f"  validation   {clean(validation['id'])}  (held apart: the model never saw it)")
    screen.title("Optimize")
    spec = {
        "model_id": model["id"],
        "calibration": {"dataset_id": calibration["id"]},
        "validation": {"dataset_id": validation["id"], "max_accuracy_loss_percent": 1.0},
        "benchmark": {"batch_sizes": list(BATCH_SIZES), "min_seconds": min_seconds},
    }
    return within(screen, client, spec, *BUDGETS_S)


def within(screen: Screen, client: Client, spec: Mapping[str, Any], seconds: int, *more: int) -> dict[str, Any]:
    """The job that succeeded: in so many seconds, or in more, where they do not hold the original's measurement."""
    job = client.submit({**spec, "budget_seconds": seconds})
    try:
        return client.wait(job["id"], on_event=Progress(screen))
    except JobFailed as failed:
        if failed.code != "budget_too_small" or not more:
            raise
    screen.line(f"  {seconds} s are too few on this machine, as busy as it is: once more, with {more[0]} s.")
    return within(screen, client, spec, *more)


def unpack(bundle: Path, folder: Path) -> Path:
    """Extract the bundle; answers the folder that holds its `infer.py`."""
    if zipfile.is_zipfile(bundle):
        with zipfile.ZipFile(bundle) as archive:
            archive.extractall(folder)  # drops absolute paths and ".." by itself
    elif tarfile.is_tarfile(bundle):
        with tarfile.open(bundle) as tar:
            tar.extractall(folder, filter="data")
    else:
        raise DemoFailed(f"the bundle {bundle.name} is neither a zip nor a tar archive")
    scripts = sorted(folder.rglob("infer.py"))
    if not scripts:
        raise DemoFailed("the bundle holds no infer.py")
    return scripts[0].parent


def compare(screen: Screen, folder: Path, report: dict[str, Any]) -> None:
    """Original and engine side by side on the held-out digits, and what the job said of the same."""
    sources = {"original": HERE / "model.onnx", "engine": folder}
    files = ([HERE / "model.onnx"], sorted(folder.glob("model.*")))
    with contextlib.ExitStack() as stack:
        processes = {name: Process(source) for name, source in sources.items()}
        for process in processes.values():
            stack.callback(process.close)
        screen.now("  … running both here, in turns")
        judged = {name: process.ask(accuracy=True) for name, process in processes.items()}
        here = {batch: beside(processes["original"], processes["engine"], batch) for batch in BATCH_SIZES}
    right = [judged[name]["accuracy"] for name in sources]
    rows = []
    for i, name in enumerate(sources):
        speeds = ["1x" if i == 0 else interval(vars(here[b])) for b in BATCH_SIZES]
        p50 = [number(here[b].p50_ms[i], 3, " ms") for b in BATCH_SIZES]
        size = sum(f.stat().st_size for f in files[i]) / 1e6
        rows.append([name, f"{right[i]:.2f} %", *p50, *speeds, number(size, 3, " MB")])
    told = shipped_speedups(report)
    rows.append(["", "", *("" for _ in BATCH_SIZES), *(interval(told.get(str(b))) for b in BATCH_SIZES), "by the job"])
    screen.title(
        f"Run here: the downloaded engine beside the original, on {judged['engine']['samples']} held-out digits"
    )
    head = [
        "",
        "Accuracy",
        *(f"p50 b={b}" for b in BATCH_SIZES),
        *(f"Speed-up b={b} [95 %]" for b in BATCH_SIZES),
        "Size",
    ]
    table(screen, head, rows, [(), ("bold", "green"), ("dim",)])
    screen.line("  " + agreement({str(b): vars(found) for b, found in here.items()}, told))
    if right[0] - right[1] > 1.0:
        raise DemoFailed(f"the engine loses {right[0] - right[1]:.2f} points of accuracy, over the limit of 1.0")


def agreement(here: Mapping[str, Mapping[str, Any]], told: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the job's speed-ups and those measured here are the same, as far as their intervals tell, and what two
    processes of one engine differ by, which no interval over the rounds of one of them holds."""
    sizes = [size for size in here if size in told]
    if not sizes:
        return "The original shipped: there is no speed-up to compare."
    gaps = {s: max(here[s]["low"] / told[s]["high"], told[s]["low"] / here[s]["high"]) for s in sizes}
    apart = [s for s in sizes if gaps[s] > PROCESSES_DIFFER]
    if not apart:
        close = [s for s in sizes if gaps[s] > 1]
        if close:
            most = 100 * (max(gaps[s] for s in close) - 1)
            return (
                f"The job and this run agree within {most:.1f} %, as two processes of one engine do, at batch size "
                f"{' and '.join(sizes)}."
            )
        return f"The job and this run agree: their intervals overlap at batch size {' and '.join(sizes)}."
    far = max(abs(math.log(here[s]["speedup"] / told[s]["ratio"])) for s in apart)
    return (
        f"The job and this run differ at batch size {' and '.join(apart)} by up to {100 * math.expm1(far):.0f} %, more "
        "than their intervals say: the machine was not the same in both moments."
    )


def demo(screen: Screen, client: Client, out: Path, min_seconds: float, served: Callable[[], None]) -> None:
    """`served`: called when the service is needed no more."""
    job = optimize(screen, client, min_seconds)
    report = client.report(job["id"])
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    show_report(screen, report)
    engine_ids = job.get("engine_ids") or []
    if not engine_ids:
        raise DemoFailed("the job succeeded but names no engine")
    bundle = client.download_bundle(engine_ids[0], out / "bundle")
    served()
    compare(screen, unpack(bundle, out / "engine"), report)


@contextlib.contextmanager
def service_at(url: str | None, port: int, home: Path, screen: Screen) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a running service: the given one, or one of our own that is stopped at the end; and what lets our
    own begin to stop before that."""
    if url is not None:
        yield url, lambda: None
        return
    service = Service(home, port or free_port())
    screen.now("  … starting the service")
    started = time.monotonic()
    try:
        with service:
            screen.line(f"Service ready at {service.url} after {time.monotonic() - started:.1f} s")
            yield service.url, service.ask_to_stop
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            screen.title("The end of the service's log")
            for text in service.tail().splitlines():
                screen.line("  " + clean(text))
        raise
    screen.line()
    screen.line("The service has stopped; no process of it is left.")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a running service (default: start one)")
    parser.add_argument("--api-key", default=os.environ.get("ANNEAL_API_KEY"), help="default: $ANNEAL_API_KEY")
    parser.add_argument(
        "--port", type=int, default=int(os.environ.get("PORT") or 0), help="default: $PORT or a free one"
    )
    parser.add_argument("--out", type=Path, help="keep report, bundle and engine in this folder")
    parser.add_argument("--min-seconds", type=float, default=0.3, help="measured per engine and batch size")
    return parser.parse_args()


def interrupted(_signum: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demo the way Ctrl-C does: the service is stopped first."""
    raise KeyboardInterrupt


def main() -> int:
    args = parsed_arguments()
    screen = Screen()
    signal.signal(signal.SIGTERM, interrupted)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="anneal-demo-") as temp:
            home, out = Path(temp) / "home", args.out or Path(temp) / "out"
            home.mkdir()
            out.mkdir(parents=True, exist_ok=True)
            with (
                service_at(args.url, args.port, home, screen) as (url, served),
                Client(url, args.api_key) as client,
            ):
                demo(screen, client, out, args.min_seconds, served)
    except KeyboardInterrupt:
        screen.line("Interrupted.")
        return 130
    except (AnnealError, DemoFailed, EngineFailed, ServiceFailed, OSError) as error:
        word = "The job failed" if isinstance(error, JobFailed) else "The demo failed"
        screen.line(screen.paint(f"{word}: {clean(error)}", "red"))
        return 1
    screen.line(f"Done in {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
