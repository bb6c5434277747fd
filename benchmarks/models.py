"""Jobs on models of real size, end to end: ResNet-50, all-MiniLM-L6-v2 and an LSTM.

    python benchmarks/models.py                # about ten minutes on two cores; the first run makes the models (torch)
    python benchmarks/models.py --only lstm

Each goes to a real deployment (`python -m app serve`, fresh folder) with calibration and validation data. Shown is
every configuration that the service tried, beside the baseline of the same job: the uploaded model on ONNX Runtime with
its default options, measured in turns with the candidates by the service's own method.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from _common import CannotMeasure, deployment, execute, parser, say, scratch, table

from anneal_client import Client, Event

NAMES = ("resnet50", "minilm", "lstm")
BATCHES = ("1", "8")

Json = dict[str, Any]


def optimize(client: Client, name: str, arguments: argparse.Namespace) -> tuple[str, Json, Json, float]:
    """(label, job, report, seconds from the upload's begin to the report)."""
    try:
        from make_models import case
    except ImportError as error:
        raise CannotMeasure(f"the models are made with torch ({error}): pip install -e '.[cpu,torch]'") from error
    files = case(name)
    say(f"{files.label} …")
    started = time.perf_counter()
    model = client.upload_model(files.model)
    calibration, validation = client.upload_dataset(files.calibration), client.upload_dataset(files.validation)
    job = client.submit(
        model_id=model["id"],
        shapes=files.shapes,
        calibration={"dataset_id": calibration["id"]},
        validation={
            "dataset_id": validation["id"],
            "metric": arguments.metric or files.metric,
            "max_accuracy_loss_percent": arguments.max_loss,
        },
        benchmark={"batch_sizes": [int(b) for b in BATCHES], "min_seconds": arguments.min_seconds},
        budget_seconds=arguments.budget,
    )
    job = client.wait(job["id"], on_event=note, check=False)
    if job["status"] != "succeeded":
        raise CannotMeasure(f"{files.label}: the job {job['status']}: {job['error']}")
    report = client.report(job["id"])
    return files.label, job, report, time.perf_counter() - started


def note(event: Event) -> None:
    data = event.data
    if event.type == "stage" and data.get("status") in ("succeeded", "failed") and not data.get("cached"):
        what = " · ".join(str(data[k]) for k in ("stage", "candidate") if data.get(k))
        say(f"  {what:<36} {data['status']:<10} {data.get('seconds') or 0:7.1f} s")


def rows_of(label: str, report: Mapping[str, Any]) -> list[list[str]]:
    """The baseline's row, then one per candidate."""
    rows = []
    for entry in (report["baseline"], *report["candidates"]):
        original = entry["id"] == report["baseline"]["id"]
        cells = [label if original else "", entry["name"], entry["precision"]]
        for size in BATCHES:
            at = entry["batches"].get(size, {})
            cells += [milliseconds(at), "1x" if original else speedup(at)]
        cells += ["–" if original else agreement(entry["accuracy"]), f"{entry['size_mb'] or 0:.1f}"]
        shipped = report["picked"] == entry["id"]
        if original:
            cells += ["**picked**" if shipped else "–", "the baseline"]
        else:
            cells += ["**picked**" if shipped else entry["status"], entry["reason"]]
        rows.append(cells)
    return rows


def milliseconds(at: Mapping[str, Any]) -> str:
    value = at.get("p50_ms") or at.get("mean_ms")
    return "–" if value is None else f"{value:.3g}"


def speedup(at: Mapping[str, Any]) -> str:
    ratio = at.get("speedup")
    return f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "–"


def agreement(accuracy: Mapping[str, Any] | None) -> str:
    """Loss by the metric, and beside it the outputs' error relative to the original's and the top-1 agreement."""
    if not accuracy or accuracy.get("loss_percent") is None:
        return "broken" if accuracy and accuracy.get("broken") else "–"
    text = f"{accuracy['loss_percent']:.3f}"
    for output in accuracy.get("outputs", {}).values():
        if "normalized_error" in output:
            text += f"; error {100 * output['normalized_error']:.2g} %"
        if "agreement" in output:
            text += f", top-1 {100 * output['agreement']:.1f} %"
    return text


def summary(label: str, job: Mapping[str, Any], report: Mapping[str, Any], seconds: float) -> list[str]:
    final = report["final_metrics"] or {}
    work = sum(s["seconds"] or 0 for s in job["stages"])
    analysis = report["analysis"]
    return [
        label,
        f"{(analysis['parameters'] or 0) / 1e6:.1f} M",
        f"{seconds:.0f} s",
        f"{seconds - work:.1f} s",
        str(report["picked"]),
        str(final.get("speedup", "–")),
        "yes" if report["noisy"] else "no",
        "; ".join(f"{s['name']}: {s['reason']}" for s in report["skipped"]) or "–",
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[list[str]] = []
    summaries: list[list[str]] = []
    reports: Json = {}
    with scratch(arguments.folder, 2 << 30) as folder:
        for name in arguments.only or NAMES:
            try:
                with deployment(folder / name) as service, Client(service.url) as client:
                    label, job, report, seconds = optimize(client, name, arguments)
            except CannotMeasure as reason:
                print(f"Not measured: {reason}\n")
                reports[name] = {"not_measured": str(reason)}
                continue
            rows += rows_of(label, report)
            summaries.append(summary(label, job, report, seconds))
            reports[name] = {"seconds": seconds, "report": report}
    head = ["model", "configuration", "precision"]
    head += [text for b in BATCHES for text in (f"p50 ms b={b}", f"speed-up b={b} [95 %]")]
    print(table([*head, "loss, points", "MB", "verdict", "why"], rows), end="\n\n")
    head = ["model", "parameters", "time to result", "of it not the stages'", "pick", "speed-up", "noisy", "not tried"]
    print(table(head, summaries), end="\n\n")
    print(
        f"Speed-up: p50 of the baseline / p50 of the candidate; {arguments.min_seconds:g} s per engine and batch.\n"
        f"Loss: top-1 in points where the data has labels, else 1 - cosine in percent; limit {arguments.max_loss:g}.\n"
        "MiniLM has its own weights, ResNet-50 was trained on small textures, the LSTM is seeded with a fitted head."
    )
    return {"models": reports}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--only", choices=NAMES, action="append", help="may be given several times")
    options.add_argument("--min-seconds", type=float, default=3, help="benchmark.min_seconds of the jobs")
    options.add_argument("--max-loss", type=float, default=1.0, help="validation.max_accuracy_loss_percent")
    options.add_argument("--metric", help="validation.metric (default: top1 where there are labels, else cosine)")
    options.add_argument("--budget", type=int, default=1800, help="budget_seconds of each job")
    execute(measure, options.parse_args())
