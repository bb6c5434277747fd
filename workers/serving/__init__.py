"""Serving: the dynamic batcher and the server that ship with every engine, and what is found out about one before.

`SHIPPED` lie in a bundle as they are here, beside `infer.py`: they import the standard library, numpy and what the
bundle's `requirements.txt` names, and one another, with or without this package around them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

# Name in the bundle → file here.
SHIPPED: Final = {
    "batcher.py": "batcher.py",
    "fair_queue.py": "fair_queue.py",
    "grpc_server.py": "grpc_server.py",
    "http1.py": "http1.py",
    "http_messages.py": "http_messages.py",
    "instances.py": "instances.py",
    "rows.py": "rows.py",
    "serve.py": "server.py",
    "serving_settings.py": "serving_settings.py",
    "v2.py": "v2.py",
}
# What the server imports beside numpy.
LIBRARIES: Final = ("httptools", "orjson", "uvloop")


def shipped() -> dict[str, bytes]:
    """The sources of `SHIPPED`, by their names in the bundle."""
    folder = Path(__file__).parent
    return {name: (folder / file).read_bytes() for name, file in SHIPPED.items()}
