"""How an engine is served: `serving.json`, and the errors that a request can end with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE = "serving.json"
_MOST = 65_536


class SettingsError(ValueError):
    """A setting that cannot be, named, with what it may be."""


@dataclass(frozen=True)
class Settings:
    """`instances` processes of the engine with `threads` compute threads each (None: as it was measured).

    `max_batch`: rows of a batch (1: one by one); `max_delay_ms`: how long the first request of a batch may wait for
    others while an instance is idle; `preferred_batches`: sizes that are not waited for any longer; `queue_limit`:
    requests that may wait. `batch_axis`: 0 for an input along whose first axis the samples lie, None for one that is
    the same for all of them; inputs that it does not name have 0. `pad`: axes of inputs that are filled up with zeros
    to the next of these sizes, so that requests of other sizes share a batch; `cut`: the axes of outputs that follow
    them, as [input, axis], which are cut back. `reason`: why it is served as it is, for a reader. `call_limit_s`: after
    which an instance that does not answer is taken for hung."""

    instances: int = 1
    threads: int | None = None
    max_batch: int = 1
    max_delay_ms: float = 0.0
    preferred_batches: tuple[int, ...] = ()
    queue_limit: int = 256
    pad: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    batch_axis: Mapping[str, int | None] = field(default_factory=dict)
    cut: Mapping[str, Mapping[int, tuple[str, int]]] = field(default_factory=dict)
    reason: str | None = None
    call_limit_s: float = 120.0

    def __post_init__(self) -> None:
        """Raises `SettingsError`."""
        for name in ("instances", "max_batch", "queue_limit"):
            _whole(name, getattr(self, name), 1)
        if self.threads is not None:
            _whole("threads", self.threads, 1)
        for name in ("max_delay_ms", "call_limit_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise SettingsError(f"{name} is {value!r}: give a number, 0 or more")
        for size in self.preferred_batches:
            _whole("preferred_batches", size, 1, self.max_batch)
        for name, axis in self.batch_axis.items():
            if axis not in (0, None) or isinstance(axis, bool):
                raise SettingsError(
                    f"batch_axis of {name} is {axis!r}: 0, or null where the input is the same for all samples; a "
                    "model whose batch lies elsewhere is served one by one (max_batch 1, null for every input)"
                )
        for name, axes in self.pad.items():
            least = 1 if self.batch_axis.get(name, 0) == 0 else 0
            for axis, sizes in axes.items():
                _whole(f"pad of {name}: axis", axis, least, 63)
                if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                    raise SettingsError(f"pad of {name}, axis {axis} is {list(sizes)}: give growing sizes, 1 or more")
        for name, followed in self.cut.items():
            for axis, (source, at) in followed.items():
                if at not in self.pad.get(source, {}):
                    raise SettingsError(
                        f"cut of {name}, axis {axis} follows axis {at} of {source}, which is not padded"
                    )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Settings:
        """Of what `serving.json` holds; raises `SettingsError`."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise SettingsError(f"{', '.join(unknown)}: there is no such setting; there are {', '.join(sorted(known))}")
        given = dict(value)
        if given.get("pad") and "cut" not in given:
            raise SettingsError("pad needs cut: which axes of outputs follow a padded axis ({} where none does)")
        try:
            given["preferred_batches"] = tuple(given.get("preferred_batches") or ())
            given["pad"] = {n: {int(a): tuple(s) for a, s in axes.items()} for n, axes in given.get("pad", {}).items()}
            given["cut"] = {
                n: {int(a): (str(s), int(at)) for a, (s, at) in axes.items()}
                for n, axes in given.get("cut", {}).items()
            }
            return cls(**given)
        except (TypeError, AttributeError) as error:
            raise SettingsError(f"{FILE} is not as it should be: {error}") from None

    @classmethod
    def of_folder(cls, folder: Path) -> Settings:
        """Those of a bundle; the defaults where it has none."""
        path = folder / FILE
        return cls.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        told: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return told


def _whole(name: str, value: Any, least: int, most: int = _MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise SettingsError(f"{name} is {value!r}: give a whole number from {least} to {most}")


class ServingError(Exception):
    """How a request ended that has no answer. `code` is stable snake_case."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


class InvalidRequest(ServingError):
    """Arrays that the engine does not take: `invalid_request`, `input_refused` (by the engine itself), `too_large`."""


class Rejected(ServingError):
    """Not taken, or given up before it began: `queue_full`, `stopping`, `not_ready`. Again after `retry_after_s`."""

    def __init__(self, code: str, detail: str, retry_after_s: float) -> None:
        super().__init__(code, detail)
        self.retry_after_s = retry_after_s


class TimedOut(ServingError):
    """`deadline_exceeded`: there was no answer by the request's deadline."""


class Failed(ServingError):
    """`inference_failed`; `instance_died`: the engine's process ended under it, and again when it was tried alone."""
