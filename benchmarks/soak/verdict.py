"""What a soak has shown, of one run or of several together.

python benchmarks/soak/verdict.py FOLDER...        # each with the result.json of a run
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.soak.recoveries import WAITED_FOR, spread, table

Json = dict[str, Any]

_ZERO = ("lost_jobs", "lost_models", "ended_twice", "never_ended", "engines_twice", "without_engine")
_ZEROS = "lost 0, twice 0, stuck 0, orphans 0, leaked bytes 0, leftover processes 0, leftover folders 0"


def verdict(result: Json) -> list[str]:
    """What is wrong with a run, in words; empty where all is well."""
    if not result["whole"]:
        return ["it was cut before its end: nothing was counted but faults and recoveries"]
    wrong = [f"{name}: {result[name]}" for name in _ZERO if result[name]]
    wrong += [f"{name}: {result[name]}" for name in ("stuck", "same_key_twice", "trouble") if result[name]]
    wrong += [f"failed: {result['failures']} {result['failed_details']}"] if result["failures"] else []
    again = result["stages"]["more_than_one_a_fault"]
    short = {job: {k: v for k, v in told.items() if k != "story"} for job, told in again.items()}
    wrong += [f"more than one stage repeated a fault: {short}"] if again else []
    never = {kind: times["never"] for kind, times in result["recovery"].items() if times["never"]}
    wrong += [f"not recovered within three minutes: {never}"] if never else []
    storage, left = result["storage"], result["left"]
    wrong += [f"orphans: {storage['orphans'][:5]}, {storage['bytes']} bytes"] if storage["orphans"] else []
    wrong += [f"uploads left open: {storage['open_uploads'][:5]}"] if storage["open_uploads"] else []
    return wrong + [f"left over: {name} {left[name][:5]}" for name in ("processes", "files") if left[name]]


def told(result: Json) -> str:
    """A run's figures."""
    faults, minutes = sum(result["faults"].values()), result["minutes"]
    lines = [
        f"{faults} faults of {len(result['faults'])} kinds in {minutes:g} minutes, {result['workers']} workers",
        "",
    ]
    lines += [table(result["recovery"], result["faults"]), ""]
    lines += ["Seconds, median / maximum; those of servers from when they were there again.", ""]
    if result["whole"]:
        lines += [f"{result['jobs']} jobs: {result['status']}; {result['storage']['blobs']} blobs; {result['starts']}"]
        stages = {k: v for k, v in result["stages"].items() if k != "more_than_one_a_fault"}
        lines += [f"stages: {stages}"]
    lines += [f"a fault could not be made: {line[:500]}" for line in result["faults_that_failed"]]
    lines += [f"nothing to strike: {result['in_vain']}"] if result["in_vain"] else []
    wrong = verdict(result)
    return "\n".join([*lines, *(f"WRONG  {line}" for line in wrong), *([] if wrong else [zeros()])])


def zeros() -> str:
    return f"{_ZEROS}, more than one stage repeated a fault 0"


def together(results: Sequence[Json]) -> Json:
    """Several runs' faults, recoveries and counts as one. What is wrong with each is `verdict`'s to say."""
    whole = [result for result in results if result["whole"]]
    return {
        "minutes": sum(result["minutes"] for result in results),
        "faults": dict(sorted(_sum(result["faults"] for result in results).items())),
        "recovery": _recoveries([result["recovery"] for result in results]),
        "jobs": sum(result["jobs"] for result in whole),
        "status": dict(_sum(result["status"] for result in whole)),
        "blobs": sum(result["storage"]["blobs"] for result in whole),
        "stages": {
            name: sum(result["stages"][name] for result in whole)
            for name in ("begun", "done_again", "taken", "tried_again")
        },
    }


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    return sum((Counter(count) for count in counts), Counter[str]())


def _recoveries(found: Sequence[Json]) -> Json:
    kinds = sorted({kind for recovery in found for kind in recovery})
    all_of = {kind: [recovery[kind] for recovery in found if kind in recovery] for kind in kinds}
    return {
        kind: {
            **{
                name: spread([seconds for times in of_it for seconds in (times.get(name) or {"all": []})["all"]])
                for name in WAITED_FOR
            },
            "never": sum(times["never"] for times in of_it),
        }
        for kind, of_it in all_of.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    results = {folder: json.loads((folder / "result.json").read_text()) for folder in parser.parse_args().folders}
    all_of_them, wrong = together([*results.values()]), 0
    faults = sum(all_of_them["faults"].values())
    kinds, minutes = len(all_of_them["faults"]), all_of_them["minutes"]
    print(f"{faults} faults of {kinds} kinds in {minutes:g} minutes, {len(results)} runs\n")
    print(table(all_of_them["recovery"], all_of_them["faults"]))
    print(f"\n{all_of_them['jobs']} jobs: {all_of_them['status']}; {all_of_them['blobs']} blobs")
    print(f"stages: {all_of_them['stages']}")
    for folder, result in results.items():
        found = verdict(result)
        wrong += len(found)
        print(f"{folder.name}: {sum(result['faults'].values())} faults, {'; '.join(found) or zeros()}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
