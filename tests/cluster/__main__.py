"""`make cluster`: the whole of it, until Ctrl-C."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.cluster.cluster import Cluster, cluster
from tests.cluster.topology import COUNTS
from tests.integrations.environments import NotInstalled
from tests.servers import ServerFailed, answers


def told(found: Cluster, key: str) -> str:
    """For whoever looks at it: addresses, a key, what to try."""
    prometheus = found.prometheus_url or f"none ({(found.without_prometheus or '').splitlines()[-1]})"
    lines = [
        f"Service      {found.url}    (pages, /docs, /v1; the proxy before {' and '.join(found.urls)})",
        f"Prometheus   {prometheus}",
        f"PostgreSQL   {found.environment['DATABASE_URL']}",
        f"Redis        {found.environment['BROKER_URL']}",
        f"S3           {found.s3_server.endpoint_url}    (bucket {found.bucket})",
        f"Workers      {len(found.workers)}, metrics at ports {', '.join(map(str, found.metrics_ports))}",
        f"Logs         {found.folder}",
        f"API key      {key}    (of the tenant `cluster`; shown once)",
        "",
        f"  curl -H 'Authorization: Bearer {key}' {found.url}/v1/capabilities",
        "",
        "Ctrl-C ends all of it and removes what it kept.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="of the proxy")
    parser.add_argument("--apis", type=int, default=COUNTS["api"])
    parser.add_argument("--workers", type=int, default=COUNTS["worker"])
    arguments = parser.parse_args()
    if answers(arguments.port):
        print(f"Something listens at port {arguments.port} already; take another one: make cluster PORT=8001")
        return 1
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    folder = Path(tempfile.mkdtemp(prefix="anneal-cluster-"))
    print("Starting PostgreSQL, Redis, S3, API processes, workers, the proxy, Prometheus ...", flush=True)
    try:
        sizes = {"workers": arguments.workers, "apis": arguments.apis}
        with cluster(folder, **sizes, settings={}, whole=True, port=arguments.port) as found:
            key = found.run("app", "create-key", "--tenant", "cluster")
            print(told(found, key), flush=True)
            ended.wait()
            print("Stopping ...", flush=True)
    except (ServerFailed, NotInstalled) as failure:
        print(failure, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:  # Ctrl-C meanwhile
        if not ended.is_set():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
