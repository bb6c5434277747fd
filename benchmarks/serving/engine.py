"""What both peers' applications share: the bundle's own `infer.py`, and tensors in JSON as base64 of their bytes, the
leanest way that both frameworks take as they come. Runs in the peers' environments: the standard library and numpy."""

from __future__ import annotations

import base64
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def load() -> Callable[[Arrays], Arrays]:
    """The engine of the bundle in `$BUNDLE`, on as many of the machine's cores as `$THREADS` says, warmed up."""
    folder, threads = Path(os.environ["BUNDLE"]), int(os.environ["THREADS"])
    cores = sorted(os.sched_getaffinity(0))
    if threads < len(cores):  # instances beside each other: each on cores of its own
        first = os.getpid() % (len(cores) // threads) * threads
        os.sched_setaffinity(0, cores[first : first + threads])
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("infer", folder / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, run = module.load()
    with np.load(folder / "sample_input.npz") as sample:
        for _ in range(3):
            run({name: sample[name] for name in sample.files})
    found: Callable[[Arrays], Arrays] = run
    return found


def decoded(tensors: dict[str, Any]) -> Arrays:
    return {
        name: np.frombuffer(base64.b64decode(t["data"]), t["dtype"]).reshape(t["shape"]) for name, t in tensors.items()
    }


def encoded(arrays: Arrays) -> dict[str, Any]:
    return {
        name: {"dtype": a.dtype.name, "shape": list(a.shape), "data": base64.b64encode(a.tobytes()).decode()}
        for name, a in arrays.items()
    }


def joined(parts: list[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def parted(arrays: Arrays, rows: list[int]) -> list[Arrays]:
    ends = np.cumsum(rows)
    return [
        {name: a[start:end] for name, a in arrays.items()} for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
