"""The dynamic batcher of the bundle: what it adds to a call, and whether any of a million requests is lost or mixed up.

    .venv/bin/python -m benchmarks.batcher [--requests 1000000] [--seed 1]

The engine is numpy (`tests/factories/serving.py`): it takes next to no time, so that what is timed is the batcher, and
the answer to a row tells whose it is. The requests have random sizes, shapes, callers and deadlines; some fail, some
end the engine's process, some are left by their caller. Each must end once: with its own rows, or with the error that
it asked for, or rejected or late. An answer that is another's ends the run at once; exit code 1 where one is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.factories.serving import bundle, play
from workers.serving.batcher import Batcher, Settings
from workers.serving.instances import keep_freed_memory

CALLS = 3000


async def overhead(folder: Path) -> None:
    """One caller: what `submit` takes, less what the engine's own call takes in this process."""
    keep_freed_memory()  # as `serve.py` does
    sys.path.insert(0, str(folder))
    from infer import load  # type: ignore[import-not-found]

    _names, run = load()
    print("| input of the one caller | p50 ms | p99 ms | engine alone, p50 ms | **overhead, p50 ms** |")
    print("|---|---|---|---|---|")
    async with Batcher(folder, Settings(max_batch=8)) as batcher:
        for columns in (16, 4096, 75_264):  # the last: 588 KiB, as an image of 224 × 224 in float32
            feeds = {"x": np.ones((1, columns), np.int64)}
            with_it, without = [], []
            for _ in range(CALLS):
                start = time.perf_counter()
                await batcher.submit(feeds)
                middle = time.perf_counter()
                run(feeds)
                with_it.append(middle - start)
                without.append(time.perf_counter() - middle)
            p50, p99 = (1e3 * float(np.percentile(with_it, q)) for q in (50, 99))
            alone = 1e3 * float(np.median(without))
            print(f"| {columns * 8 / 1024:.0f} KiB | {p50:.3f} | {p99:.3f} | {alone:.3f} | **{p50 - alone:.3f}** |")


async def million(folder: Path, requests: int, seed: int) -> bool:
    settings = Settings(instances=2, max_batch=16, max_delay_ms=0.2, preferred_batches=(8,), queue_limit=256)
    start = time.perf_counter()
    async with Batcher(folder, settings) as batcher:
        ended = await play(batcher, seed, requests, 300, deaths=2e-5)
        seconds = time.perf_counter() - start
        stats = batcher.stats
        left = batcher.waiting + batcher.in_flight
    batches = sum(stats.batches.values())
    rows = sum(n * size for size, n in stats.batches.items())
    print(f"\n{requests:,} requests in {seconds:.0f} s; batches: {batches:,}, of {rows / batches:.2f} rows on average")
    print(f"processes that ended: {stats.restarts}; requests that were run once more: {stats.retried:,}")
    for how, n in ended.most_common():
        print(f"- {how}: {n:,}")
    lost = requests - sum(ended.values())
    uncounted = requests - sum(stats.ended.values())
    print(f"lost: {lost}; counted otherwise by the batcher: {uncounted}; left in it: {left}")
    return not (lost or uncounted or left)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = bundle(Path(scratch) / "bundle")
        asyncio.run(overhead(folder))
        return 0 if asyncio.run(million(folder, args.requests, args.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
