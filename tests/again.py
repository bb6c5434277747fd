"""Runs the tests that failed once more, each with the machine to itself, and tells which then passed.

One of five thousand tests that share two cores may fall to what ran beside it. That is told, not hidden: such a test
or the product has a fault that only company shows. More than a few are no accident and are not tried again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MOST = 3
_FAILED = Path(".pytest_cache") / "v" / "cache" / "lastfailed"


def main(most: int = MOST) -> int:
    """0 where each of them passed now."""
    failed = sorted(json.loads(_FAILED.read_text())) if _FAILED.exists() else []
    if not failed:
        print("again: no test is known to have failed; what went wrong stands above", flush=True)
        return 1
    if len(failed) > most:
        print(f"again: {len(failed)} tests failed; up to {most} are run once more", flush=True)
        return 1
    passed = [
        test for test in failed if subprocess.run([sys.executable, "-m", "pytest", test], check=False).returncode == 0
    ]
    for test in failed:
        what = "FAILED BESIDE OTHERS, passed alone: look into it" if test in passed else "failed twice"
        print(f"again: {what}: {test}", flush=True)
    return 0 if passed == failed else 1


if __name__ == "__main__":
    sys.exit(main())
