"""Client of Anneal, inference optimization as a service. Speaks HTTP only."""

from anneal_client.aio import AsyncClient
from anneal_client.answers import Answer, Manifest
from anneal_client.client import Client
from anneal_client.engines import LocalEngine, load_bundle
from anneal_client.errors import (
    AnnealError,
    Conflict,
    ConnectionFailed,
    ConversionFailed,
    DigestMismatch,
    EngineUnusable,
    InvalidRequest,
    JobFailed,
    NotFound,
    Unauthorized,
    Unavailable,
    UploadInterrupted,
    WaitTimeout,
)
from anneal_client.events import Event
from anneal_client.progress import Progress
from anneal_client.reports import Comparison, Report
from anneal_client.results import AsyncResult, Result
from anneal_client.webhooks import SignatureMismatch, verify_webhook

__version__ = "0.1.0"
__all__ = [
    "AnnealError",
    "Answer",
    "AsyncClient",
    "AsyncResult",
    "Client",
    "Comparison",
    "Conflict",
    "ConnectionFailed",
    "ConversionFailed",
    "DigestMismatch",
    "EngineUnusable",
    "Event",
    "InvalidRequest",
    "JobFailed",
    "LocalEngine",
    "Manifest",
    "NotFound",
    "Progress",
    "Report",
    "Result",
    "SignatureMismatch",
    "Unauthorized",
    "Unavailable",
    "UploadInterrupted",
    "WaitTimeout",
    "load_bundle",
    "verify_webhook",
]
