"""What travels through the broker: task names and ids, nothing else."""

from __future__ import annotations

OPTIMIZE = "anneal.optimize"
QUEUE_PREFIX = "anneal"


def queue_for(device: str, hardware: str | None = None) -> str:
    """The queue that jobs for this device, or for this very hardware, wait in."""
    return f"{QUEUE_PREFIX}.hw.{hardware}" if hardware else f"{QUEUE_PREFIX}.{device}"
