"""Backup and restore as docs/backup.md has them: PostgreSQL and blobs are destroyed while a job is in its stages, and
on other ones everything goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.factories.deployment import Deployment, deployment, kill, submit_case, wait_for_stage, write_case

pytestmark = pytest.mark.timeout(280)


def _postgres(tool: str, *arguments: str) -> None:
    binaries = servers.postgres_binaries()
    done = subprocess.run([binaries / tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _copy(source: Path, target: Path) -> None:
    """As `rsync -a --exclude=/tmp`."""
    shutil.copytree(source, target, ignore=lambda folder, _: {"tmp"} if Path(folder) == source else set())


def _doctor(deployed: Deployment, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "app.admin", "--json", "doctor", *arguments]
    done = subprocess.run(command, env=deployed.environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_destroyed_and_restored(postgres_url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    dump, blobs = tmp_path / "anneal.dump", tmp_path / "blobs"
    with servers.new_database(postgres_url) as url, deployment(first, {"DATABASE_URL": url}) as deployed:
        db = deployed.database()
        with deployed.client() as client:
            deleted = client.upload_model(write_case(tmp_path, 61)[0])
            kept = client.upload_model(write_case(tmp_path, 62)[0])
            running = submit_case(client, tmp_path, 60)["id"]
            worker = deployed.start_hurried_worker()
            assert wait_for_stage(db, running, {"benchmark", "validate", "build"}) is not None
            _postgres("pg_dump", "--format=custom", f"--file={dump}", url)
            # The service goes on between the two.
            client.delete_model(deleted.id)
            late = client.upload_model(write_case(tmp_path, 63)[0])
            _copy(first / "blobs", blobs)
        kill(worker)
        db.close()
        key = deployed.api_key
    shutil.rmtree(first)  # the database has gone with its `with`

    with servers.new_database(postgres_url) as url:
        _postgres("pg_restore", "--no-owner", f"--dbname={url}", str(dump))
        second.mkdir()
        shutil.copytree(blobs, second / "blobs")
        with deployment(second, {"DATABASE_URL": url}) as restored:
            code, told = _doctor(restored)
            lacking = [("missing", deleted.sha256)]
            assert (code, [(line["problem"], line["what"]) for line in told if "what" in line]) == (1, lacking)
            restored.api_key = key  # the one from before
            restored.start_hurried_worker()
            with restored.client() as client:
                job = client.wait(running)
                assert job.status == "succeeded", restored.logs()
                assert any(stage.cached for stage in job.stages), "what had finished before the dump is not done again"
                client.download_bundle(job.engine_ids[0], tmp_path / "bundle.zip")
                assert {kept.id, deleted.id} <= {model.id for model in client.models()}
                assert late.id not in {model.id for model in client.models()}
                client.upload_model(write_case(tmp_path, 61)[0])  # replaces what is missing
            assert _doctor(restored, "--hash")[0] == 0
