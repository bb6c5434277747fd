"""Client of Anneal, inference optimization as a service. Speaks HTTP only."""

from anneal_client.client import Client
from anneal_client.errors import (
    AnnealError,
    Conflict,
    ConnectionFailed,
    DigestMismatch,
    InvalidRequest,
    JobFailed,
    NotFound,
    Unauthorized,
    Unavailable,
    UploadInterrupted,
)
from anneal_client.events import Event

__version__ = "0.1.0"
__all__ = [
    "AnnealError",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DigestMismatch",
    "Event",
    "InvalidRequest",
    "JobFailed",
    "NotFound",
    "Unauthorized",
    "Unavailable",
    "UploadInterrupted",
]
