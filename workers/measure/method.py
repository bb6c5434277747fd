"""What a report says of how it was measured: the method in words, and the versions of the libraries."""

from __future__ import annotations

from collections.abc import Iterable

from workers import devices
from workers.kernel import backends
from workers.libraries import installed_versions
from workers.measure.claim import MOST_APART
from workers.measure.disturbance import MOST_OTHERS, MOST_STOLEN, MOST_WAITED, TURN_S
from workers.measure.instances import SETTLE_S
from workers.measure.load.judged import LEAST_LATE_S, MOST_LATE
from workers.measure.plan import MIN_ROUNDS

_PERCENTILES = "nearest rank; shown from p50 11, p90 64, p95 130, p99 662, p99.9 6,636 samples on"


def benchmark_method(
    *, baseline_backend: str, default_options: bool, min_seconds: float, inputs: str, screening: bool, cold: bool
) -> dict[str, str]:
    """How the benchmark stage measures. `inputs`: where the inputs come from, in words."""
    session = "default options" if default_options else "the given options"
    warm_up = (
        "until three windows agree within 10 %, or are no faster than those before, after at least 50 iterations or "
        "1 s; a few uncounted "
    )
    most_wide = devices.of_backend(baseline_backend).most_wide
    against = "one baseline process" if screening else "both baseline processes"
    words = {
        "baseline": f"the original model, exported to ONNX, on {baseline_backend} with {session}, "
        "measured in the same run",
        "rounds": "all engines in turn (A B C A B C …), each in a warm process of its own, the order drawn anew "
        f"every round; at least {MIN_ROUNDS} rounds, {min_seconds:g} s per engine and batch size",
        "warm_up": warm_up + "iterations at the start of every window, but where one call takes 0.2 s",
        "inputs": inputs,
        "call": "what a user of the bundle's infer.py calls: numpy arrays in, numpy arrays of their own out, for the "
        "baseline InferenceSession.run; it decides. `bound`, where it stands beside it, is the cheapest call: inputs "
        "bound before, outputs left where the library puts them; five short windows, against one baseline process",
        "latency": "wall time of one call, one caller (closed loop)",
        "percentiles": _PERCENTILES,
        "speedup": "p50 of the baseline / p50 of the engine in each round, the pseudo-median (Hodges–Lehmann) of the "
        f"rounds; 95 % interval by bootstrap over rounds, against {against}",
        "throughput": "batch size / mean latency, in samples per second, one caller",
        "a_a": "the baseline in two processes against each other, by p50 and by throughput; nothing is claimed where "
        f"it is off by more than {100 * (MOST_APART - 1):.0f} % or wider than {100 * (most_wide - 1):.0f} %",
        "disturbance": f"a window counts where the engine's threads waited at most {MOST_WAITED:.0%} of it and "
        f"{1000 * TURN_S:.0f} ms for a core, {MOST_STOLEN:.0%} of the cores' time were stolen and other processes took "
        f"{MOST_OTHERS:.0%}; else it is taken again where the time holds that, and engines are compared over the "
        "rounds in which neither had company; nothing is claimed where most windows had some, or where those that "
        "count had more than that together",
        "cold_start": "load and first inference in a fresh process, the library already imported, files in "
        "the disk cache",
        "memory": "peak resident memory of that process in MB (10⁶ bytes), interpreter and library included, after "
        "one inference at each batch size; on a GPU also by how much the memory in use there grew meanwhile",
    }
    if screening:
        words["screening"] = (
            "a short timing that only tells what can still win: at least five calls per engine and batch size, a "
            "warm-up of 0.3 s at most, at least two distinct inputs, no percentiles beyond the median"
        )
        words["a_a"] = "not measured: a short timing proves nothing"
    if not cold:
        words["cold_start"] = words["memory"] = "not measured: it was not asked for"
    return words


def sweep_method(*, inputs: str, pinned: bool, min_seconds: float, passes: int) -> dict[str, str]:
    """How the sweep stage measures."""
    where = "each instance pinned to cores of its own" if pinned else "instances not pinned to cores"
    return {
        "load": "closed loop: every instance starts its next call when the one before has ended; all instances run "
        f"at the same time, one process each, {where}",
        "window": f"common to all instances, opened {SETTLE_S * 1e3:.0f} ms after all have started; only calls that "
        f"end inside it count; {min_seconds:g} s per configuration in {passes} passes",
        "order": "the first pass by growing batch, the others in an order drawn anew",
        "throughput": "samples per second: batch size × the instances' rates between their first and last call in "
        "the window, added up; mean of the passes",
        "latency": "wall time of one call, numpy arrays in and out as in the bundle's infer.py, all instances together",
        "percentiles": _PERCENTILES,
        "memory": "peak of all processes together in MB (10⁶ bytes), pages that they share counted once "
        "(proportional set size), up to and with this batch size",
        "inputs": inputs,
    }


def load_method(arrivals: str) -> dict[str, str]:
    """How the load_test stage measures. `arrivals`: in words."""
    return {
        "load": f"open loop: requests come when they are due ({arrivals}), whatever became of those before",
        "latency": "from the moment at which a request was due until its answer; what was refused, failed or came "
        "after its caller had left counts as later than any limit",
        "server": "the batcher that lies in the bundle, one process for each instance, the generator in its process "
        "and on the same cores; the original behind the same server, one by one, with its library's defaults",
        "limit": "kept where the p99's bound by order statistics is within it (95 %, the early stopping of MLPerf "
        "LoadGen); exceeded where so many requests were late that it cannot be; between the two nothing is claimed. It "
        "supposes that requests are late independently of each other; near saturation they are not, so what is kept "
        "is measured once more on other arrivals",
        "goodput": "the highest rate that keeps the limit below all that do not, by bisection; its interval ends at "
        "the lowest rate that was proven to exceed it",
        "tuning": "by short looks: a closed loop says what a setup yields, then those that yield most race at a rate "
        "just above the best so far; the winner has to hold its rate by the bound, and the setup that the search "
        "started from has to miss it by the bound",
        "generator": "a rate at which the generator sent 1 of 100 requests more than "
        f"{100 * MOST_LATE:.0f} % of the limit (at least {1000 * LEAST_LATE_S:g} ms) late, or had company on the "
        "cores, says nothing against the engine",
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of the distributions behind these backends, under the name they are installed by."""
    known = backends()
    return installed_versions(sorted({lib for name in names if name in known for lib in known[name].libraries}))
