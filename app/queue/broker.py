"""The Celery application, shared by the API (which only sends) and the workers (which also run)."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES

from app.settings import Settings

_SEND_TIMEOUT_S = 1.0


def make_celery(settings: Settings, *, sends_only: bool = False) -> Celery:
    """A Celery app for the broker of the settings. Nothing connects here. One that `sends_only` gives up on a broker
    that is away after about a second; a worker's waits for it to come back.

    Messages only wake: what makes a job safe is its row, the lease there and the sweeper, so a transport that loses
    messages (the file-system one) is good enough. They are acknowledged late so that a worker that runs a job takes no
    second one: whoever is idle is to hear it.
    """
    TRANSPORT_ALIASES["filesystem"] = "app.queue.filesystem:Transport"
    app = Celery("anneal", broker=settings.broker, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(settings),
    )
    if sends_only:
        app.conf.broker_connection_timeout = _SEND_TIMEOUT_S
        if not settings.broker.startswith("filesystem"):
            # kombu takes these for the connection it makes by itself below `publish`, which `retry=False` does not
            # reach: without them it tries again, after 2 s and 4 s, until the connection time-out is over.
            app.conf.broker_transport_options |= {
                "max_retries": 0,
                "socket_connect_timeout": _SEND_TIMEOUT_S,
                "socket_timeout": _SEND_TIMEOUT_S,
            }
    return app


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.broker.startswith("filesystem"):
        folder = settings.broker_dir
        for name in ("messages", "control"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return {
            "data_folder_in": str(folder / "messages"),
            "data_folder_out": str(folder / "messages"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.02,  # the default of 1 s would be the latency of a job
        }
    # Redis: above the longest job, or the message would run a second time beside the first (the lease stops that too).
    return {
        "visibility_timeout": 24 * 3600,
        "socket_connect_timeout": 3,
        "socket_timeout": 30,
        "socket_keepalive": True,
        "health_check_interval": 15,
    }
