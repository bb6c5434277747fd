"""Bytes that are not what they are called, and crashes that are a machine's: neither becomes a truth for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.blobs.content import blob_key, sha256_file
from app.db.orm import LOCAL_TENANT, SourceModel, StageResult
from app.db.uow import Database
from app.domain.failures import StageFailure
from app.settings import Settings
from app.storage.base import BlobStore
from app.storage.factory import make_store
from tests.conftest import new_bucket
from tests.factories import onnx_models
from tests.factories.deployment import Deployment, deployment, submit_case
from tests.factories.stages import Misbehave
from tests.integration.conftest import Desk
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits
from workers.pipeline.runner import StageRunner
from workers.pipeline.workspace import open_workspace


def _blob(deployed: Deployment, sha256: str) -> Path:
    return deployed.home / "blobs" / "objects" / blob_key(LOCAL_TENANT, sha256)


def _damage(path: Path) -> None:
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def _made_by(db: Database, stage: str) -> list[str]:
    with db.read() as session:
        rows = session.scalars(select(StageResult).where(StageResult.stage == stage))
        return [file["sha256"] for row in rows for files in row.outputs.values() for file in files]


def test_a_damaged_file_is_never_built_on(tmp_path: Path) -> None:
    """One that a stage made is made again; an upload ends the job with words, for only its owner has it."""
    with deployment(tmp_path / "home") as deployed, deployed.client() as client:
        db = deployed.database()
        deployed.start_hurried_worker()
        first = submit_case(client, tmp_path, 1)
        assert client.wait(first["id"])["status"] == "succeeded"
        made = _made_by(db, "build")
        for sha256 in made:
            _damage(_blob(deployed, sha256))
        second = submit_case(client, tmp_path, 1, benchmark={"batch_sizes": [2], "min_seconds": 0.1})
        assert client.wait(second["id"])["status"] == "succeeded", deployed.logs()
        assert made
        for sha256 in made:
            assert sha256_file(_blob(deployed, sha256)) == sha256

        upload = client.upload_model(onnx_models.save(onnx_models.mlp(seed=7), tmp_path / "other.onnx"))
        with db.read() as session:
            sha256 = session.get_one(SourceModel, upload["id"]).sha256
        _damage(_blob(deployed, sha256))
        job = client.wait(client.submit({"model_id": upload["id"]})["id"], check=False)
        assert job["status"] == "failed"
        assert job["error"]["code"] == "blob_corrupted"
        assert sha256 in job["error"]["detail"]
        assert _blob(deployed, sha256).exists()
        db.close()


@pytest.fixture(scope="module", params=["local", "s3"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, BlobStore]]:
    """A deployment with a worker on each kind of storage, and that storage."""
    bucket = new_bucket(request.getfixturevalue("s3_server")) if request.param == "s3" else None
    home = tmp_path_factory.mktemp("stored") / "home"
    with deployment(home, bucket.variables if bucket else None) as deployed:
        deployed.start_hurried_worker()
        deployed.wait_ready()
        yield deployed, make_store(Settings(home=home, **({"storage": bucket.settings()} if bucket else {})))


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "flipped"])
def test_an_upload_that_was_damaged_is_mended_by_sending_it_again(
    stored: tuple[Deployment, BlobStore], tmp_path: Path, cut: bool
) -> None:
    deployed, store = stored
    source = onnx_models.save(onnx_models.mlp(seed=9 + cut), tmp_path / "net.onnx")
    with deployed.client() as client:
        first = client.upload_model(source)
        db = deployed.database()
        with db.read() as session:
            row = session.get_one(SourceModel, first["id"])
            key = blob_key(row.tenant_id, row.sha256)
        db.close()
        damaged, whole = tmp_path / "damaged", tmp_path / "whole"
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 0x40
        damaged.write_bytes(content[:-1] if cut else content)
        store.put_file(key, damaged, replace=True)

        def run(model: dict[str, Any]) -> dict[str, Any]:
            spec = {
                "model_id": model["id"],
                "target": {"backends": ["onnxruntime"]},
                "precisions": ["fp32"],
                "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
            }
            return client.wait(client.submit({**spec, "budget_seconds": 60})["id"], check=False)

        failed = run(first)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "blob_corrupted"), failed
        assert "Upload the same file again" in failed["error"]["remedy"]
        again = client.upload_model(source)
        assert run(again)["status"] == "succeeded", deployed.logs()
        store.fetch(key, whole)
        assert whole.read_bytes() == source.read_bytes()
        assert run(first)["status"] == "succeeded", "the earlier model is the same content"


@pytest.mark.parametrize("bound", [True, False])
def test_a_crash_is_kept_only_where_the_key_holds_the_machine(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    isolated = IsolatedRunner(["tests.factories.stages"])
    monkeypatch.setattr(Misbehave, "hardware_bound", bound)
    job = desk.submit()
    claim = desk.claim(job)
    assert claim is not None
    home = Settings(home=tmp_path).home_dir
    desk.put_blob("0" * 64)
    try:
        with open_workspace(home, "w", LOCAL_TENANT, desk.content) as workspace:
            runner = StageRunner(
                claim=claim,
                ledger=desk.ledger,
                isolated=isolated,
                workspace=workspace,
                hardware={},
                fingerprint="this machine",
                limits=Limits(20, 4 << 30, 8 << 20),
                lock_dir=tmp_path,
                should_stop=lambda: False,
            )
            for how, code in (("crash", "runtime_crashed"), ("invalid", "not_this_model")):
                with pytest.raises(StageFailure) as caught:
                    runner.run("misbehave", {}, {"how": how})
                assert caught.value.code == code
    finally:
        isolated.close()
    with desk.db.read() as session:
        codes = {row.failure["code"] for row in session.scalars(select(StageResult)) if row.failure}
    assert codes == ({"runtime_crashed", "not_this_model"} if bound else {"not_this_model"})
