"""Airflow 3 provider of Anneal: a connection type, a hook, a deferrable operator and its trigger."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def get_provider_info() -> dict[str, Any]:
    """What Airflow shows of the provider, and where it finds the connection type."""
    return {
        "package-name": "anneal-airflow",
        "name": "Anneal",
        "description": "Inference optimization as a service.",
        "versions": [__version__],
        "hooks": [{"integration-name": "Anneal", "python-modules": ["anneal_airflow.hook"]}],
        "operators": [{"integration-name": "Anneal", "python-modules": ["anneal_airflow.operator"]}],
        "triggers": [{"integration-name": "Anneal", "python-modules": ["anneal_airflow.trigger"]}],
        "connection-types": [
            {"connection-type": "anneal", "hook-class-name": "anneal_airflow.hook.AnnealHook"},
        ],
    }
