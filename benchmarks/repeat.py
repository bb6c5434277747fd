"""The same job twice, each on a deployment of its own with nothing cached: are graphs and picks the same?

    python benchmarks/repeat.py --models digits,minilm

Every graph that both jobs made from the same key is compared digest by digest. Goal: all the same; and the same pick,
or picks whose speed-up intervals overlap at every batch size.
"""

from __future__ import annotations

import argparse
from typing import Any

from _common import deployment, execute, parser, scratch, table, verdict
from make_models import named
from peers import anneal

from anneal_client import AnnealError, Client

# Stages whose output is a graph; an engine of OpenVINO or TensorRT is made from it, and holds times of its making.
GRAPHS = ("export", "simplify", "equalize", "quantize", "quantize_nncf", "convert")
Json = dict[str, Any]


def once(files: Any, arguments: argparse.Namespace) -> Json:
    fields = {
        "benchmark": {"batch_sizes": [1, 8], "min_seconds": arguments.job_seconds},
        "budget_seconds": arguments.budget,
    }
    with (
        scratch(arguments.folder, 4 << 30) as folder,
        deployment(folder / "home") as service,
        Client(service.url) as client,
    ):
        job, report, _ = anneal.run_job(client, files, lambda _: None, **fields)
        manifest = client.manifest(job["id"])
    graphs = {s["key"]: (s["stage"], s["outputs"]) for s in manifest["stages"] if s["stage"] in GRAPHS}
    speed = {
        c["id"]: {b: at["speedup"] for b, at in c["batches"].items() if at.get("speedup")} for c in report["candidates"]
    }
    return {"graphs": graphs, "picked": report["picked"], "speedup": speed.get(report["picked"], {})}


def _gains(found: Json) -> str:
    return ", ".join(f"{at['ratio']:.2f}x" for at in found["speedup"].values())


def overlap(one: Json, other: Json) -> bool:
    sizes = [b for b in one if b in other]
    return all(one[b]["low"] <= other[b]["high"] and other[b]["low"] <= one[b]["high"] for b in sizes)


def measure(arguments: argparse.Namespace) -> Json:
    rows, figures = [], {}
    for name, files in named(arguments.models):
        try:
            first, second = once(files, arguments), once(files, arguments)
        except (anneal.JobEnded, AnnealError) as failure:
            rows.append([files.label, "–", "–", str(failure)[:80], "–"])
            continue
        both = sorted(set(first["graphs"]) & set(second["graphs"]))
        same = [k for k in both if first["graphs"][k] == second["graphs"][k]]
        shown = [f"{found['picked']} ({_gains(found)})" for found in (first, second)]
        fine = len(same) == len(both) and (
            first["picked"] == second["picked"] or overlap(first["speedup"], second["speedup"])
        )
        rows.append([files.label, f"{len(same)} of {len(both)}", *shown, verdict(fine)])
        figures[name] = {"graphs": len(both), "same": len(same), "picked": [first["picked"], second["picked"]]}
    print(table(["model", "same graphs", "pick", "pick again", "goal"], rows), end="\n\n")
    return {"models": figures}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="digits,digits_mobile,lstm,minilm", help="some of make_models.py's")
    options.add_argument("--budget", type=int, default=300, help="budget_seconds of each job")
    options.add_argument("--job-seconds", type=float, default=3, help="benchmark.min_seconds of the jobs")
    execute(measure, options.parse_args())
