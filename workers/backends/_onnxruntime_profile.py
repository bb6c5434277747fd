"""Where an ONNX Runtime session spends its time, node by node, from the runtime's own profiler."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.kernel import LayerTime

_KERNEL = "_kernel_time"


def layer_times(profile: Path, runs: int) -> list[LayerTime]:
    """From the trace file of a session that ran `runs` times after one run to warm up, which is left out."""
    spent: dict[str, float] = defaultdict(float)
    op_types: dict[str, str] = {}
    seen: dict[str, int] = defaultdict(int)
    for event in json.loads(profile.read_text()):
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_KERNEL):
            continue
        node = name.removesuffix(_KERNEL)
        seen[node] += 1
        if seen[node] > 1:  # the first run allocates
            spent[node] += float(event.get("dur", 0.0))
        op_types[node] = str((event.get("args") or {}).get("op_name", ""))
    return sorted((LayerTime(n, op_types[n], us / 1e3 / runs) for n, us in spent.items()), key=lambda t: -t.ms)


def profiled(session: Any, feeds: Mapping[str, Any], runs: int) -> Path:
    """Run a session that was made with profiling on; its trace file."""
    for _ in range(runs + 1):
        session.run(None, dict(feeds))
    return Path(session.end_profiling())
