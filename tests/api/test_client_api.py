"""The client against the real API: weights beside a model, uploads of processes that were killed, lists."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from anneal_client import AnnealError, AsyncClient, Client, InvalidRequest, NotFound
from app.settings import LimitSettings, Settings
from tests.factories import onnx_models

PART = 5 << 20


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"limits": LimitSettings(upload_bytes=64 << 20, part_bytes=PART)})


@pytest.fixture
def anneal(base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("ANNEAL_CACHE", str(tmp_path / "cache"))
    with Client(base_url, retries=1) as client:
        yield client


def test_a_model_in_two_files_is_sent_whole(anneal: Client, tmp_path: Path) -> None:
    path = onnx_models.save_external(onnx_models.mlp(), tmp_path / "net" / "net.onnx", location="net.onnx.data")
    (path.parent / "unrelated.bin").write_bytes(b"x")
    model = anneal.upload_model(path)
    assert (model.name, model.filename, model.format) == ("net", "net.tar", "archive")
    assert [i.name for i in model.inputs] == ["input"]
    assert anneal.upload_model(path.parent, "by folder").sha256 == model.sha256
    sent = anneal.download_model(model.id, tmp_path / "sent.tar")
    with tarfile.open(sent) as archive:
        assert sorted(archive.getnames()) == ["net.onnx", "net.onnx.data"]
    parted = anneal.upload_model(path, "in parts", parts_above=0)
    assert parted.sha256 == model.sha256

    (path.parent / "net.onnx.data").unlink()
    with pytest.raises(AnnealError, match=r"net\.onnx\.data") as caught:
        anneal.upload_model(path)
    assert caught.value.code == "external_data_missing"
    assert "external_data=False" in str(caught.value.remedy)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd"])
def test_weights_that_lie_elsewhere_are_not_sent(anneal: Client, tmp_path: Path, location: str) -> None:
    import onnx

    path = onnx_models.save_external(onnx_models.mlp(), tmp_path / "net.onnx")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(AnnealError, match="not in its folder"):
        anneal.upload_model(path)


DYING = """
import os, signal, sys
from anneal_client import Client, sources

whole = sources.file_blocks
def dying(path, start, length):
    if start == 2 * int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(path, start, length)

sources.file_blocks = dying
Client(sys.argv[1]).upload_dataset(sys.argv[2], parts_above=0, workers=1)
"""


def test_a_killed_upload_goes_on_with_the_parts_that_are_there(
    anneal: Client, base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(3 * PART // 32, 4)))
    assert 2 * PART < path.stat().st_size < 4 * PART
    command = [sys.executable, "-c", DYING, base_url, str(path), str(PART)]
    assert subprocess.run(command, env=dict(os.environ), check=False).returncode == -signal.SIGKILL
    (note,) = (tmp_path / "cache" / "uploads").iterdir()
    session = httpx.get(f"{base_url}/v1/uploads/{note.read_text()}").json()
    assert [part["number"] for part in session["received_parts"]] == [1, 2]

    put = _puts(monkeypatch)
    dataset = anneal.upload_dataset(path, parts_above=0)
    assert dataset.samples == 3 * PART // 32
    assert sorted(put) == [f"/v1/uploads/{session['id']}/parts/{n}" for n in range(3, session["parts"] + 1)]
    assert httpx.get(f"{base_url}/v1/uploads/{session['id']}").json()["status"] == "consumed"
    assert not note.exists()


def test_what_was_uploaded_by_a_process_that_did_not_hear_of_it_is_not_made_twice(
    anneal: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((8, 4), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr("anneal_client.resuming.Note.forget", lambda note: None)  # it died before it came to that
        first = anneal.upload_dataset(path, parts_above=0)
    put = _puts(monkeypatch)
    assert anneal.upload_dataset(path, parts_above=0).id == first.id
    assert put == []
    second = anneal.upload_dataset(path, parts_above=0)
    assert second.id != first.id, "asked for anew, it is made anew"


def _puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the parts that are sent from now on."""
    from anneal_client.io import BlockingIo

    put: list[str] = []
    request = BlockingIo.request

    async def noting(self: BlockingIo, own: bool, method: str, url: httpx.URL, **options: Any) -> httpx.Response:
        if method == "PUT":
            put.append(url.path)
        return await request(self, own, method, url, **options)

    monkeypatch.setattr(BlockingIo, "request", noting)
    return put


def test_lists_and_single_resources(anneal: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anneal_client.core._PAGE", 2)
    path = onnx_models.save(onnx_models.mlp(), tmp_path / "net.onnx")
    made = [anneal.upload_model(path, f"net{number % 2}") for number in range(5)]
    assert [model.id for model in anneal.models()] == [model.id for model in reversed(made)]
    assert [model.id for model in anneal.models("net1")] == [made[3].id, made[1].id]
    assert anneal.model(made[0].id) == made[0]
    assert made[0].created_at.tzinfo is not None
    anneal.delete_model(made[0].id)
    with pytest.raises(NotFound):
        anneal.model(made[0].id)
    assert list(anneal.jobs(status="failed")) == list(anneal.engines()) == list(anneal.datasets()) == []
    assert anneal.readiness().ready
    assert anneal.capabilities().workers == []


def test_a_job_that_is_refused_says_why(anneal: Client, worker: Any, tmp_path: Path) -> None:
    model = anneal.upload_model(onnx_models.save(onnx_models.mlp(), tmp_path / "net.onnx"))
    job = anneal.submit(model_id=model.id, constraints={"p99_latency_ms": 5})
    assert job.spec["constraints"]["p99_latency_ms"] == 5
    assert job.children == []
    assert [j.id for j in anneal.jobs(model_id=model.id)] == [job.id]
    with pytest.raises(InvalidRequest, match="objective"):
        anneal.submit(model_id=model.id, objective="speed")  # type: ignore[arg-type]
    assert anneal.cancel(job.id).status in ("cancelled", "queued")


def test_the_async_client_streams_files_both_ways(base_url: str, tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.mlp(hidden=512, features=1024), tmp_path / "net.onnx")

    async def both_ways() -> None:
        async with AsyncClient(base_url) as client:
            model, parted = None, None
            async with anyio.create_task_group() as group:

                async def whole() -> None:
                    nonlocal model
                    model = await client.upload_model(path)

                async def in_parts() -> None:
                    nonlocal parted
                    parted = await client.upload_model(path, "parted", parts_above=0)

                group.start_soon(whole)
                group.start_soon(in_parts)
            assert model is not None
            assert parted is not None
            assert {m.id async for m in client.models()} == {model.id, parted.id}
            back = await client.download_model(parted.id, tmp_path / "back.onnx")
            assert io.BytesIO(back.read_bytes()).getvalue() == path.read_bytes()

    anyio.run(both_ways)
