"""Engines in the caller's process: real bundles, kept by their digest, and what is wrong with others."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np
import pytest

from anneal_client import AsyncClient, Client, EngineUnusable, load_bundle
from tests.factories import onnx_models
from tests.factories.bundled import bundled
from tests.factories.faulty_service import FaultyService, answer_json, faulty_service, ranged
from tests.unit.test_by_batch import MOST, apart, packaged, rows, side_by_side
from workers.kernel import backends


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANNEAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = onnx_models.mlp(features=8, classes=4)
    return bundled("onnxruntime", model, tmp_path_factory.mktemp("bundle") / "m").bundle


@pytest.fixture
def service() -> Iterator[FaultyService]:
    with faulty_service() as server:
        yield server


def serve(service: FaultyService, archive: Path) -> str:
    content = archive.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    service.on("GET", "/v1/engines/eng_1", answer_json(200, {"id": "eng_1", "bundle_sha256": sha256}))
    service.on("GET", "/v1/engines/eng_1/bundle", ranged(content, f'"{sha256}"'))
    return sha256


def downloads(service: FaultyService) -> int:
    return sum(path.endswith("/bundle") for _, path, _, _ in service.seen)


def test_an_engine_computes_here_and_its_bundle_is_fetched_once(
    service: FaultyService, archive: Path, cache: Path
) -> None:
    sha256 = serve(service, archive)
    with Client(service.url, retries=0) as client:
        engine = client.load_engine("eng_1")
        assert engine.check()
        assert engine.inputs == ("input",)
        x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
        (out,) = engine(x).values()
        assert out.shape == (3, 4)
        for same in (engine({"input": x}), engine(input=x), client.load_engine("eng_1", threads=1)(x)):
            assert np.allclose(next(iter(same.values())), out, atol=1e-5)
        assert downloads(service) == 1
        assert sorted(p.name for p in (cache / "engines").iterdir()) == [sha256]

        # What is no longer as it was unpacked is not run.
        (engine.folder / "infer.py").write_text("raise SystemExit('not the engine')")
        assert client.load_engine("eng_1").check()
        (engine.folder / "model.onnx").unlink()
        assert client.load_engine("eng_1").check()
        assert downloads(service) == 3

    async def looped() -> None:
        async with AsyncClient(service.url) as there:
            assert (await there.load_engine("eng_1")).check()

    anyio.run(looped)
    assert downloads(service) == 3


def test_two_engines_of_two_libraries_in_one_bundle(tmp_path: Path) -> None:
    engine, runtime = side_by_side(tmp_path, apart())
    bundle, _ = packaged(tmp_path, engine, runtime)
    both = load_bundle(bundle)
    assert both.check()
    for count, kind in ((1, "small"), (MOST + 1, "large")):
        (found,) = both(rows(count)).values()
        alone = next(e for e in runtime["engines"] if e["folder"] == kind)
        session = backends()[alone["backend"]]().load(engine / kind, alone["runtime"])
        assert np.allclose(found, next(iter(session.run(rows(count)).values())), atol=1e-5)


def test_threads_share_an_engine(archive: Path) -> None:
    engine = load_bundle(archive)
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    wanted = [next(iter(engine(x[i : i + 1]).values())) for i in range(8)]
    found: dict[int, np.ndarray] = {}

    def ask(i: int) -> None:
        found[i] = next(iter(engine(x[i : i + 1]).values()))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(found[i], wanted[i], atol=1e-6) for i in range(8))


def test_tensors_of_torch_are_taken(archive: Path) -> None:
    import torch

    engine = load_bundle(archive)
    x = torch.ones(2, 8, requires_grad=True)
    assert np.array_equal(engine(x)[next(iter(engine(x)))], engine(x.detach().numpy())[next(iter(engine(x)))])


def test_wrong_inputs_are_named(archive: Path) -> None:
    engine = load_bundle(archive)
    x = np.zeros((1, 8), np.float32)
    with pytest.raises(EngineUnusable, match="input missing; x unknown"):
        engine(x=x)
    with pytest.raises(EngineUnusable, match="input missing"):
        engine({})


def test_a_library_that_is_missing(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    script = (folder / "infer.py").read_text()
    (folder / "infer.py").write_text(script.replace("import onnxruntime as ort", "import onnxruntime_of_mars as ort"))
    with pytest.raises(EngineUnusable, match="needs onnxruntime_of_mars") as caught:
        load_bundle(folder)
    assert caught.value.code == "engine_library_missing"
    assert str(folder / "requirements.txt") in str(caught.value.remedy)
    (folder / "infer.py").write_text(script)
    (folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(EngineUnusable, match="engine_not_loaded") as caught:
        load_bundle(folder)
    assert "onnxruntime" in str(caught.value.remedy) or "another library" in str(caught.value.remedy)


@pytest.mark.parametrize("name", ["../infer.py", "/tmp/infer.py", "a\\..\\infer.py"])
def test_a_bundle_stays_in_its_folder(name: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(zipfile.ZipInfo(name), "raise SystemExit")
        packed.writestr("manifest.json", json.dumps({}))
    with pytest.raises(EngineUnusable, match="leaves its folder"):
        load_bundle(path)
    assert list((cache / "engines").iterdir()) == []


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK nothing")
    with pytest.raises(EngineUnusable, match="is no bundle"):
        load_bundle(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as packed:
        packed.writestr("config.pbtxt", "")
    with pytest.raises(EngineUnusable, match=r"no infer\.py"):
        load_bundle(tmp_path / "y.zip")
