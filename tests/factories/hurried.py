"""A worker for jobs whose figures nobody looks at: every stage up to the package as any worker runs it, but it waits
for no quiet machine (beside other tests none is), takes no window twice, and explains nothing. Imported where stages
run; run as a module it is such a worker."""

from __future__ import annotations

import math
import sys

from workers.measure import quiet, rounds
from workers.pipeline import budget, explain

_WARM_UP_S = 0.1  # beside others the windows of a warm-up never agree, and it would go on for a second


def _warm_up_cap(min_seconds: float, screening: bool = False) -> float:
    return _WARM_UP_S


quiet.PATIENCE_S = 0.0
rounds._RETAKES = 0
rounds.warm_up_cap = _warm_up_cap  # type: ignore[attr-defined]
budget.LEAST_EXPLAINED_S = math.inf
explain.LEAST_EXPLAINED_S = math.inf  # type: ignore[attr-defined]

if __name__ == "__main__":
    from workers import service
    from workers.__main__ import main
    from workers.pipeline.isolated import IsolatedRunner

    service.IsolatedRunner = lambda **how: IsolatedRunner([__spec__.name], **how)  # type: ignore[attr-defined]
    sys.exit(main())
