"""TensorRT's real parser and builder (for RTX, no GPU) under mutated graphs, each in a child as a worker runs it.

    .venv/bin/python -m benchmarks.fuzz_parser --graphs 5000 --seed 1

Prints how often each answer came. Exits 1 where one of them is no typed failure, or a process was lost.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.factories.examining import fuzzed
from tests.factories.mutations import mutated
from workers.pipeline.isolated import IsolatedRunner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    isolated = IsolatedRunner()
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            found, untyped = fuzzed(isolated, mutated(asked.graphs, asked.seed), Path(folder))
    finally:
        isolated.close()
    for answer, count in found.most_common():
        print(f"{count:6} {answer}")
    print(f"{sum(found.values())} graphs in {time.monotonic() - start:.0f} s, {len(untyped)} without a typed answer")
    for line in untyped[:50]:
        print(line)
    return 1 if untyped else 0


if __name__ == "__main__":
    sys.exit(main())
