"""MLflow 3 (extra `mlflow`): jobs in runs, engines in the registry and out of it, jobs for what is registered.

Everything goes to the tracking server that MLflow is set to (`MLFLOW_TRACKING_URI`, `mlflow.set_tracking_uri`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anneal_client.mlflow.anneal_engine_pyfunc import Engine
    from anneal_client.mlflow.flavor import FLAVOR_NAME, load_model, save_model, signature_of
    from anneal_client.mlflow.registry import optimize
    from anneal_client.mlflow.tracking import Logged, log_job

__all__ = ["FLAVOR_NAME", "Engine", "Logged", "load_model", "log_job", "optimize", "save_model", "signature_of"]

_HOMES = {
    "Engine": "anneal_engine_pyfunc",
    "FLAVOR_NAME": "flavor",
    "load_model": "flavor",
    "save_model": "flavor",
    "signature_of": "flavor",
    "optimize": "registry",
    "Logged": "tracking",
    "log_job": "tracking",
}


def __getattr__(name: str) -> Any:
    """What needs MLflow is imported when it is asked for: the loader and the check of signatures need none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "mlflow":
            raise
        raise ImportError("MLflow is not installed: pip install 'anneal-client[mlflow]'") from error
