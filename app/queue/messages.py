"""What travels through the broker: task names and ids, nothing else. A message wakes a worker that listens to its
queue; which job that one takes, the database decides (`app.jobs.schedule`)."""

from __future__ import annotations

OPTIMIZE = "anneal.optimize"
HELP = "anneal.help"
QUEUE_PREFIX = "anneal"
SPECIAL_FORMATS = ("pt2",)  # model formats that only some workers read: each has queues of its own


def device_of_kind(device: str, kind: str) -> str:
    """What jobs for any device of this kind ask for: GPUs of one compute capability, say."""
    return f"{device}-{kind}"


def queue_for(device: str, hardware: str | None = None, model_format: str = "onnx") -> str:
    """The queue that jobs for this device, or for this very hardware, wait in."""
    base = f"{QUEUE_PREFIX}.hw.{hardware}" if hardware else f"{QUEUE_PREFIX}.{device}"
    return f"{base}.{model_format}" if model_format in SPECIAL_FORMATS else base


def help_queue(kind: str) -> str:
    """Where workers of this kind hear that one of them hands out calls (`app.sharing`)."""
    return f"{QUEUE_PREFIX}.help.{kind[:16]}"


def on_gpu(queue: str) -> bool:
    """Whether jobs of this queue run on a machine with a GPU."""
    return queue.startswith((f"{QUEUE_PREFIX}.cuda", f"{QUEUE_PREFIX}.hw.gpu-"))
