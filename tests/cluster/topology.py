"""What the cluster is made of, and what each process is told: the same as in docker-compose.yml, which a test
(`tests/unit/test_topology.py`) holds to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.swift_server import S3Server

ROOT = Path(__file__).resolve().parents[2]
CADDYFILE = ROOT / "docker" / "proxy" / "Caddyfile"
PROMETHEUS = ROOT / "docker" / "prometheus"
COUNTS = {"proxy": 1, "api": 2, "worker": 3, "postgres": 1, "redis": 1, "s3": 1, "prometheus": 1}
# The broker keeps nothing on disk: jobs live in the database.
REDIS = ("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction")
HOST = "127.0.0.1"


def shared(database_url: str, broker_url: str, bucket: str, s3: S3Server) -> dict[str, str]:
    """What API processes, workers and commands are told."""
    return {
        "ANNEAL_REQUIRE_KEYS": "true",
        "DATABASE_URL": database_url,
        "BROKER_URL": broker_url,
        "STORAGE_URL": f"s3://{bucket}",
        "S3_ENDPOINT_URL": s3.endpoint_url,
        "S3_PUBLIC_ENDPOINT_URL": s3.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
    }


def of_api(home: Path, port: int) -> dict[str, str]:
    """What an API process is told beside. The proxy comes from this machine's usual address."""
    return {
        "ANNEAL_HOME": str(home),
        "ANNEAL_HOST": HOST,
        "ANNEAL_PORT": str(port),
        "ANNEAL_TRUSTED_PROXIES": HOST,
    }


def of_worker(home: Path, locks: Path, metrics_port: int) -> dict[str, str]:
    """What a worker is told beside."""
    return {
        "ANNEAL_HOME": str(home),
        "WORKER_LOCK_DIR": str(locks),
        "WORKER_METRICS_HOST": HOST,
        "WORKER_METRICS_PORT": str(metrics_port),
    }


def of_proxy(port: int, apis: Sequence[int]) -> dict[str, str]:
    return {
        "ANNEAL_SITE": f":{port}",
        "ANNEAL_BIND": HOST,
        "ANNEAL_UPSTREAMS": " ".join(f"{HOST}:{api}" for api in apis),
    }


def of_prometheus(apis: Sequence[int], workers: Sequence[int], every: str) -> dict[str, Any]:
    """Its configuration, with ports in place of names that DNS would know. `every`: how often it scrapes and evaluates;
    rules are looked for beside it."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    for scraped, ports in zip(config["scrape_configs"], (apis, workers), strict=True):
        del scraped["dns_sd_configs"]
        scraped["static_configs"] = [{"targets": [f"{HOST}:{port}" for port in ports]}]
    return config
