"""The engine behind BentoML: `bentoml serve bentoml_app:Engine`. Its settings come from the environment."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import engine

_BATCH = int(os.environ["MAX_BATCH"])
# Its batcher drops what would take longer than this in all: it is no delay that it waits, so a generous limit is given.
_LATENCY_MS = int(os.environ["MAX_LATENCY_MS"])


@bentoml.service(workers=int(os.environ["INSTANCES"]), traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Engine:
    def __init__(self) -> None:
        self.run = engine.load()

    @bentoml.api(batchable=_BATCH > 1, max_batch_size=max(_BATCH, 2), max_latency_ms=_LATENCY_MS, route="/predict")
    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = [engine.decoded(request) for request in requests]
        rows = [len(next(iter(part.values()))) for part in parts]
        return [engine.encoded(part) for part in engine.parted(self.run(engine.joined(parts)), rows)]
