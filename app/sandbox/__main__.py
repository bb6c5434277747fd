"""What this machine can confine models with: `python -m app.sandbox`. Status 1 where something is open."""

from __future__ import annotations

import json
import sys

from app.sandbox.features import found


def main() -> int:
    told = found()
    sys.stdout.write(json.dumps(told.to_json("auto"), indent=2) + "\n")
    return 1 if told.missing() else 0


if __name__ == "__main__":
    sys.exit(main())
