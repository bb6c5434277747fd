"""Timing caches through storage: workers of several machines, each with a folder of its own, and one store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import storage_unavailable
from app.storage.local import LocalStore
from tests.factories import cuda_standin, tensorrt_standin
from tests.factories.tensorrt_standin import Behaviour
from workers.backends.tensorrt import timing
from workers.pipeline.shared_caches import PREFIX, SharedCaches

NAME = "tensorrt-timing-0123"


class Machine:
    """A worker's cache folder and its half of the exchange; `build` measures one kernel as a TensorRT build would."""

    def __init__(self, root: Path, store: LocalStore) -> None:
        self.folder = root
        self.path = root / f"{NAME}.cache"
        self.caches = SharedCaches(store, root)

    def build(self, *kernels: str) -> bool:
        """Whether the build began with a filled cache."""
        self.caches.pull()
        config = tensorrt_standin.IBuilderConfig()
        cache, filled = timing.attach(config, self.path)  # type: ignore[arg-type]
        cache._keys.update(kernels)  # type: ignore[union-attr]
        timing.merge(config, self.path)  # type: ignore[arg-type]
        return filled

    def keys(self) -> list[str]:
        found: list[str] = json.loads(self.path.read_bytes())["keys"]
        return found


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Behaviour]:
    with cuda_standin.installed(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def machines(tmp_path: Path, store: LocalStore, behaviour: Behaviour) -> list[Machine]:
    return [Machine(tmp_path / name, store) for name in "abc"]


def states(store: LocalStore) -> list[str]:
    return [item.key for item in store.list(PREFIX)]


def test_what_one_machine_measured_another_uses(machines: list[Machine], store: LocalStore) -> None:
    a, b, _ = machines
    assert not a.build("conv")
    a.caches.push()
    assert b.build("gemm"), "it began with what a measured"
    b.caches.push()
    assert b.keys() == ["conv", "gemm"]
    assert not [*(b.folder / f"{NAME}.others").iterdir()]
    assert len(states(store)) == 1, "the state that went into it is gone"
    a.build("relu")
    assert a.keys() == ["conv", "gemm", "relu"]


def test_machines_that_store_at_once_lose_nothing(machines: list[Machine], store: LocalStore) -> None:
    a, b, c = machines
    a.build("conv")
    b.build("gemm")
    a.caches.push()
    b.caches.push()
    assert len(states(store)) == 2
    c.build("relu")
    c.caches.push()
    assert c.keys() == ["conv", "gemm", "relu"]
    assert len(states(store)) == 1


def test_nothing_new_is_not_stored_or_fetched_again(machines: list[Machine], store: LocalStore) -> None:
    a, b, _ = machines
    a.build("conv")
    a.caches.push()
    b.build()
    b.caches.push()
    before = states(store)
    for machine in (a, b, Machine(a.folder, store)):  # the last: a worker of the same machine that has just begun
        machine.caches.pull()
        machine.caches.push()
        assert not [*(machine.folder / f"{NAME}.others").glob("*")]
    assert states(store) == before


def test_what_no_worker_stored_is_left_out(machines: list[Machine], store: LocalStore, tmp_path: Path) -> None:
    a = machines[0]
    file = tmp_path / "forged"
    file.write_bytes(b"something else")
    store.put_file(f"{PREFIX}{NAME}/{'0' * 64}", file)
    store.put_file(f"{PREFIX}deeper/{NAME}/{'1' * 64}", file)
    assert not a.build("conv")
    a.caches.push()
    assert a.keys() == ["conv"]


def test_a_build_goes_on_without_storage(
    machines: list[Machine], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = machines[0]

    def away(*_: object, **__: object) -> None:
        raise storage_unavailable("listing objects")

    for name in ("list", "fetch", "put_file", "delete"):
        monkeypatch.setattr(LocalStore, name, away)
    a.build("conv")
    a.caches.push()
    assert a.keys() == ["conv"]
    monkeypatch.undo()
    again = Machine(a.folder, store)  # the worker is started anew: what it could not store is stored now
    again.build()
    again.caches.push()
    assert len(states(store)) == 1
