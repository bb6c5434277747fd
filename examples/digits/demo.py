"""From an uploaded model to a proven engine, in front of your eyes.

    python examples/digits/demo.py                 # starts a service of its own and stops it again
    python examples/digits/demo.py --url http://…  # uses one that runs

Needs the service's `cpu` extra and the client (`clients/python`) in the environment; `make demo` sees to both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from service import Service, ServiceFailed, free_port
from view import Progress, Screen, clean, number, show_report, table

from anneal_client import AnnealError, Client, JobFailed

HERE = Path(__file__).resolve().parent
BATCH_SIZES = (1, 8)
BUDGET_S = 45  # the demo shall be short; the best so far ships when it runs out
Run = Callable[[dict[str, Any]], Any]


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
    job = client.submit(
        model_id=model["id"],
        calibration={"dataset_id": calibration["id"]},
        validation={"dataset_id": validation["id"], "max_accuracy_loss_percent": 1.0},
        benchmark={"batch_sizes": list(BATCH_SIZES), "min_seconds": min_seconds},
        budget_seconds=BUDGET_S,
    )
    return client.wait(job["id"], on_event=Progress(screen))


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


def bundled_engine(folder: Path) -> Run:
    """The engine, loaded by the bundle's own `infer.py` with the options it was measured with, whatever its library."""
    spec = importlib.util.spec_from_file_location("bundle_infer", folder / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _names, run = module.load()
    loaded: Run = run
    return loaded


def original() -> Run:
    """The uploaded model as its owner would run it: ONNX Runtime with default options."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda feeds: {"logits": session.run(None, feeds)[0]}


def accuracy(run: Run, images: Any, labels: Any) -> float:
    """Percent of the images whose largest logit is the label's; batches of 64."""
    right = 0
    for start in range(0, len(images), 64):
        (logits,) = run({"image": images[start : start + 64]}).values()
        if not np.isfinite(logits).all():
            raise DemoFailed("an output is not finite")
        right += int((logits.argmax(1) == labels[start : start + 64]).sum())
    return 100.0 * right / len(images)


def medians_ms(runs: list[Run], images: Any, batch: int, *, rounds: int = 9, per_round: int = 40) -> list[float]:
    """Median latency of each, in turns (so that a change of the machine's clock meets all), after a warm-up."""
    feeds = [{"image": np.ascontiguousarray(images[i * batch : (i + 1) * batch])} for i in range(16)]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            for i in range(per_round):
                start = time.perf_counter()
                run(feeds[i % len(feeds)])
                if turn > 0 and i >= 10:  # the first turn, and the first calls after the other's turn, warm up
                    found.append(1000 * (time.perf_counter() - start))
    return [float(np.median(found)) for found in times]


def compare(screen: Screen, folder: Path) -> None:
    """Original and engine side by side on the held-out digits, in this process."""
    with np.load(HERE / "validation.npz", allow_pickle=False) as arrays:
        images, labels = arrays["image"], arrays["labels"]
    engines = {"original": original(), "engine": bundled_engine(folder)}
    runs = [*engines.values()]
    files = ([HERE / "model.onnx"], sorted(folder.glob("model.*")))
    right = [accuracy(run, images, labels) for run in runs]
    speeds = {batch: medians_ms(runs, images, batch) for batch in BATCH_SIZES}
    rows = []
    for i, name in enumerate(engines):
        size = sum(f.stat().st_size for f in files[i]) / 1e6
        row = [name, f"{right[i]:.2f} %", *(number(speeds[b][i], 3, " ms") for b in BATCH_SIZES)]
        row += [*(number(speeds[b][0] / speeds[b][i], 3, "x") for b in BATCH_SIZES), number(size, 3, " MB")]
        rows.append(row)
    screen.title(f"Run here: the downloaded engine beside the original, on {len(images)} held-out digits")
    head = ["", "Accuracy", *(f"p50 b={b}" for b in BATCH_SIZES), *(f"Speed-up b={b}" for b in BATCH_SIZES), "Size"]
    table(screen, head, rows, [(), ("bold", "green")])
    if right[0] - right[1] > 1.0:
        raise DemoFailed(f"the engine loses {right[0] - right[1]:.2f} points of accuracy, over the limit of 1.0")


def demo(screen: Screen, client: Client, out: Path, min_seconds: float) -> None:
    job = optimize(screen, client, min_seconds)
    report = client.report(job["id"])
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    show_report(screen, report)
    engine_ids = job.get("engine_ids") or []
    if not engine_ids:
        raise DemoFailed("the job succeeded but names no engine")
    bundle = client.download_bundle(engine_ids[0], out / "bundle")
    compare(screen, unpack(bundle, out / "engine"))


@contextlib.contextmanager
def service_at(url: str | None, port: int, home: Path, screen: Screen) -> Iterator[str]:
    """The address of a running service: the given one, or one of our own that is stopped at the end."""
    if url is not None:
        yield url
        return
    service = Service(home, port or free_port())
    screen.now("  … starting the service")
    started = time.monotonic()
    try:
        with service:
            screen.line(f"Service ready at {service.url} after {time.monotonic() - started:.1f} s")
            yield service.url
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
            with service_at(args.url, args.port, home, screen) as url, Client(url, args.api_key) as client:
                demo(screen, client, out, args.min_seconds)
    except KeyboardInterrupt:
        screen.line("Interrupted.")
        return 130
    except (AnnealError, DemoFailed, ServiceFailed, OSError) as error:
        word = "The job failed" if isinstance(error, JobFailed) else "The demo failed"
        screen.line(screen.paint(f"{word}: {clean(error)}", "red"))
        return 1
    screen.line(f"Done in {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
