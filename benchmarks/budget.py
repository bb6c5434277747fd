"""How well a job keeps its `budget_seconds`: wall time over the budget, on small and large models and budgets.

    python benchmarks/budget.py --models digits,minilm --budgets 20,60

Each job runs on a deployment of its own, in a fresh folder, so that nothing is cached. Goal: at most 1.10 of the
budget, counted from the moment the worker takes the job to its end, as the job's own times say.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from typing import Any

from _common import deployment, execute, parser, say, scratch, table, verdict
from make_models import named
from peers import anneal

from anneal_client import AnnealError, Client

GOAL = 1.10


def seconds_of(job: dict[str, Any]) -> float:
    started, finished = (datetime.fromisoformat(str(job[k])) for k in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, figures = [], []
    for name, files in named(arguments.models):
        for budget in map(int, arguments.budgets.split(",")):
            say(f"{files.label}, budget {budget} s …")
            fields = {
                "benchmark": {"batch_sizes": [1, 8], "min_seconds": arguments.job_seconds},
                "budget_seconds": budget,
            }
            try:
                with (
                    scratch(arguments.folder, 4 << 30) as folder,
                    deployment(folder / "home") as service,
                    Client(service.url) as client,
                ):
                    job, report, _ = anneal.run_job(client, files, lambda _: None, **fields)
            except (anneal.JobEnded, AnnealError) as failure:
                rows.append([files.label, f"{budget} s", "–", "–", str(failure)[:80], "–"])
                continue
            spent = seconds_of(job)
            measured = sum(bool(c["batches"]) for c in report["candidates"])
            cells = [files.label, f"{budget} s", f"{spent:.1f} s", f"{spent / budget:.2f}"]
            rows.append([*cells, f"{report['picked']} ({measured} measured)", verdict(spent <= GOAL * budget)])
            figures.append({"model": name, "budget": budget, "seconds": spent, "picked": report["picked"]})
    print(table(["model", "budget", "job", "share", "picked", f"≤ {GOAL}"], rows), end="\n\n")
    return {"jobs": figures}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="digits,minilm,bert", help="some of make_models.py's")
    options.add_argument("--budgets", default="20,60,180", help="seconds")
    options.add_argument("--job-seconds", type=float, default=3, help="benchmark.min_seconds of the jobs")
    execute(measure, options.parse_args())
