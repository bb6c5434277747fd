"""Calls of the Open Inference Protocol v2 over HTTP, with tensors as binary data (Triton's extension of that name)."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from workers.kernel import Arrays

_LENGTH = "Inference-Header-Content-Length"
_KINDS = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items()}


class Refused(Exception):
    """The server answered with an error, which the message tells."""


class Connection:
    """To one model of a server on this machine; one call at a time."""

    def __init__(self, port: int, model: str, timeout_s: float) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        self._path = f"/v2/models/{model}/infer"

    def infer(self, feeds: Mapping[str, Any], outputs: Sequence[str], *, batched: bool | None = None) -> Arrays:
        """All of `outputs`, or all there are where none is named. Triton's dims are never empty: where `batched` is
        told, a number for each sample goes as [samples, 1], a single one as [1], and comes back so. Raises `Refused`,
        OSError and what `http.client` raises."""
        inputs, parts = [], []
        for name, array in feeds.items():
            part = np.ascontiguousarray(array).tobytes()
            told = {
                "name": name,
                "shape": [*array.shape, *[1] * (batched is not None and array.ndim == int(batched))],
                "datatype": _KINDS[str(array.dtype)],
            }
            inputs.append({**told, "parameters": {"binary_data_size": len(part)}})
            parts.append(part)
        wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        asked = {"outputs": wanted} if wanted else {"parameters": {"binary_data_output": True}}
        head = json.dumps({"inputs": inputs, **asked}).encode()
        headers = {_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        self._connection.request("POST", self._path, b"".join([head, *parts]), headers)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != http.HTTPStatus.OK:
            raise Refused(f"{response.status}: {body[:500].decode(errors='replace')}")
        return _arrays(body, int(response.getheader(_LENGTH) or len(body)))

    def close(self) -> None:
        self._connection.close()


def _arrays(body: bytes, head: int) -> Arrays:
    found: Arrays = {}
    at = head
    for told in json.loads(body[:head])["outputs"]:
        dtype, shape = np.dtype(_DTYPES[told["datatype"]]), told["shape"]
        size = int(told["parameters"]["binary_data_size"])
        found[told["name"]] = np.frombuffer(body, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    return found
