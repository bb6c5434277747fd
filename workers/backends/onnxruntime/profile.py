"""Where an ONNX Runtime session spends its time, node by node, from the runtime's own profiler."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.kernel import LayerTime
from workers.measure.layers import median_times

_KERNEL = "_kernel_time"
_RUN = "model_run"


def layer_times(profile: Path, warm_up: int) -> list[LayerTime]:
    """From the trace file of a session: the median of each node over all runs but the first `warm_up`, which allocate.
    What a node inside a loop took in one run is added up."""
    events = json.loads(profile.read_text())
    begun = sorted(float(e["ts"]) for e in events if e.get("cat") == "Session" and e.get("name") == _RUN)
    runs: list[dict[tuple[str, str], float]] = [defaultdict(float) for _ in begun]
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_KERNEL):
            continue
        run = bisect_right(begun, float(event["ts"])) - 1
        if run >= 0:
            op_type = str((event.get("args") or {}).get("op_name", ""))
            runs[run][name.removesuffix(_KERNEL), op_type] += float(event.get("dur", 0.0)) / 1e3
    return median_times(runs[warm_up:])


def profiled(session: Any, feeds: Mapping[str, Any], runs: int) -> Path:
    """Run a session that was made with profiling on; its trace file."""
    for _ in range(runs):
        session.run(None, dict(feeds))
    return Path(session.end_profiling())
