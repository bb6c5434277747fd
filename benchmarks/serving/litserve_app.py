"""The engine behind LitServe: `python litserve_app.py PORT`. Its settings come from the environment."""

from __future__ import annotations

import os
import sys
from typing import Any

import engine
import litserve


class Api(litserve.LitAPI):  # type: ignore[misc]  # from another environment
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.run = engine.load()

    # LitServe gives an annotation of `request` to FastAPI, which would then look for a parameter of the query.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return engine.decoded(request["inputs"])

    def batch(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
        return engine.joined(inputs), [len(next(iter(part.values()))) for part in inputs]

    def predict(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return self.run(x[0]), x[1]
        return self.run(x)

    def unbatch(self, output: tuple[dict[str, Any], list[int]]) -> list[dict[str, Any]]:
        return engine.parted(*output)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return {"outputs": engine.encoded(output)}


if __name__ == "__main__":
    api = Api(
        max_batch_size=int(os.environ["MAX_BATCH"]),
        batch_timeout=float(os.environ["MAX_DELAY_MS"]) / 1e3,
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["INSTANCES"]), timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
