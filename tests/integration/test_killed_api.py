"""An API process that is killed in the middle of an upload, or while it joins one, loses nothing and leaves nothing."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import httpx
import psycopg

from tests.factories import onnx_models
from tests.factories.deployment import Deployment, deployment, descendants, gone, kill

CONTENT = onnx_models.mlp(features=1024, hidden=2000).SerializeToString()


def restart(deployed: Deployment) -> None:
    kill(deployed.processes.pop())
    deployed.start_api()


def test_in_the_middle_of_a_body(tmp_path: Path) -> None:
    with deployment(tmp_path / "home") as deployed:
        scratch = deployed.home / "tmp"
        head = b"POST /v1/models?filename=m.onnx HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", deployed.port)) as connection:
            connection.sendall(head + bytes(8 << 20))
            deployed.wait_for(lambda: any(path.stat().st_size for path in scratch.glob("incoming-*")))
            restart(deployed)
        with socket.create_connection(("127.0.0.1", deployed.port)) as connection:
            connection.sendall(head + bytes(8 << 20))  # one that is still being received stays
            deployed.wait_for(lambda: len(list(scratch.glob("incoming-*"))) == 1 and _age(scratch) > 0, timeout_s=20)
            time.sleep(6)
            assert len(list(scratch.glob("incoming-*"))) == 1
        deployed.wait_for(lambda: not list(scratch.glob("incoming-*")))


def _age(scratch: Path) -> int:
    return sum(path.stat().st_size for path in scratch.glob("incoming-*"))


def test_it_takes_the_processes_that_look_into_files_with_it(tmp_path: Path) -> None:
    with deployment(tmp_path / "home") as deployed:
        answer = httpx.post(f"{deployed.url}/v1/models?filename=m.onnx", content=CONTENT, timeout=30)
        assert answer.status_code == 201
        family = descendants(deployed.processes[0])
        assert len(family) == 1
        kill(deployed.processes.pop())
        assert gone(family, timeout_s=5)


def test_while_it_joins_the_parts(tmp_path: Path, fresh_postgres: str) -> None:
    extra = {"DATABASE_URL": fresh_postgres, "LIMIT_UPLOAD_LEASE_S": "1", "LIMIT_COMPLETE_WAIT_S": "0.2"}
    with (
        deployment(tmp_path / "home", extra) as deployed,
        httpx.Client(base_url=deployed.url, headers=deployed.headers, timeout=30) as client,
    ):
        upload = client.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": len(CONTENT)}).json()
        for number, url in enumerate(upload["part_urls"]):
            size = upload["part_size"]
            assert client.put(url, content=CONTENT[number * size : (number + 1) * size]).status_code == 200
        path = upload["links"]["self"]
        with psycopg.connect(fresh_postgres, autocommit=True) as connection:
            connection.execute(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$"
            )
            connection.execute(
                "CREATE TRIGGER slow BEFORE UPDATE ON uploads FOR EACH ROW "
                "WHEN (NEW.status = 'completed') EXECUTE FUNCTION slow()"
            )
            assert client.post(f"{path}/complete").status_code == 202
            time.sleep(0.5)  # it stands at the last step now: the blob is stored, the row does not say so yet
            kill(deployed.processes.pop())
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            connection.execute("DROP TRIGGER slow ON uploads")
        deployed.start_api()
        time.sleep(1.1)
        deployed.wait_for(lambda: client.get(path).json()["status"] == "completed")
        assert client.post(f"{path}/complete").status_code == 200
        model = client.post("/v1/models", json={"upload_id": upload["id"]})
        assert model.status_code == 201, model.text
        assert client.get(model.json()["links"]["download"]).content == CONTENT
        tenants = deployed.home / "blobs" / "objects" / "tenants"
        assert not [found for found in tenants.glob("*/uploads/**/*") if found.is_file()]
