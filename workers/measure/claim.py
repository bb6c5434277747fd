"""Whether a benchmark may claim anything: what the kernel told of its windows, and the baseline against itself. Pure.

Interleaving and bootstrap see what is random, A/A what differs between two processes; company on the machine is
neither. Where too little was measured without it, or where the baseline cannot be told from something much faster or
slower, nothing is claimed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from workers.devices import HOST
from workers.devices.accelerator import Accelerator
from workers.measure.disturbance import MOST_WAITED, Disturbance, in_a_row, to_json
from workers.measure.rounds import Timing, counting
from workers.measure.stats import Interval

# Two processes of one engine differ by a few percent (where their memory lies); the verdict asks a gain to lie beyond
# that. More than this is no such difference.
MOST_APART = 1.10
MOST_WIDE_MEAN = 1.3  # high over low of the baseline's means against themselves, which a few slow calls move
# Of the windows of a batch size: where most had company, those that show none were lucky.
MOST_DROPPED = 0.5


def objections(
    batch: int,
    baseline: Timing,
    again: Timing,
    a_a: Interval,
    *,
    windows: Sequence[Disturbance] = (),
    device: Accelerator = HOST,
) -> list[str]:
    """Why nothing can be claimed at this batch size; empty where something can. `windows`: all that were taken at it,
    of every engine. `device`: what it all ran on."""
    rounds, enough = counting(baseline, again)
    if not enough:
        reasons = Counter(reason for side in (baseline, again) for reason in side.disturbed.values())
        clean = len(rounds) - len({*baseline.disturbed, *again.disturbed})
        kind = reasons.most_common(1)[0][0] if reasons else "nothing is known of the others"
        return [f"batch {batch}: {clean} of {len(rounds)} rounds of the original were undisturbed ({kind})"]
    if why := _company(windows, [side.meanwhile[i] for side in (baseline, again) if side.meanwhile for i in rounds]):
        return [f"batch {batch}: {why}"]
    shown = f"batch {batch}: the original against itself is {a_a.ratio:.3f} [{a_a.low:.3f}, {a_a.high:.3f}]"
    found = []
    if a_a.low > MOST_APART or a_a.high < 1 / MOST_APART:
        found.append(f"{shown}, which does not hold 1.0")
    elif a_a.high > device.most_wide * a_a.low:
        found.append(f"{shown}, which is too wide to tell a gain from noise")
    drift = max(spread([side.rounds[i] for i in rounds]) for side in (baseline, again))
    if drift > device.most_drift:
        found.append(
            f"batch {batch}: the original's own latency drifted by {100 * (drift - 1):.0f} % during the rounds"
        )
    return found


def _company(taken: Sequence[Disturbance], counted: Sequence[Disturbance]) -> str | None:
    """What the windows cannot tell one by one: short ones hide a turn of the scheduler, and a tick of the kernel's."""
    dropped = sum(w.disturbed is not None for w in taken)
    if dropped > MOST_DROPPED * len(taken):
        return f"{dropped} of {len(taken)} windows had company"
    whole = in_a_row(counted)
    if whole.waited_share > MOST_WAITED:
        return (
            f"in the windows that count, the engine's threads waited {whole.waited_share:.2g} s for a core in a second"
        )
    return whole.disturbed and f"in the windows that count, {whole.disturbed}"


def spread(rounds: Sequence[np.ndarray[Any, Any]]) -> float:
    """Third quartile over first of the rounds' medians."""
    low, high = np.quantile([float(np.median(r)) for r in rounds], (0.25, 0.75))
    return float(high / low) if low > 0 else 1.0


def disturbance(windows: Iterable[Disturbance], reasons: Sequence[str], waited_seconds: float) -> dict[str, Any]:
    """{claim, reason, clean_windows, dropped_windows, waited_seconds, waited_share, steal_share, others_share,
    sources}: what a report says of a benchmark whose windows these were (those that were taken again included)."""
    taken = [*windows]
    dropped = sum(w.disturbed is not None for w in taken)
    return to_json(
        in_a_row(taken),
        claim=not reasons,
        reason="; ".join(reasons) or None,
        clean_windows=len(taken) - dropped,
        dropped_windows=dropped,
        waited_seconds=round(waited_seconds, 2),
    )
