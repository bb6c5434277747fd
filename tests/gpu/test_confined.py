"""What code of a model reaches in a process that uses the GPU: the GPU, and nothing else that is not its own."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.sandbox.features import found
from tests.unit.test_attacks import REFUSED
from workers import devices
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits, StageRequest

FEATURES = found()


@pytest.fixture(scope="module")
def runner() -> Iterator[IsolatedRunner]:
    started = IsolatedRunner(["tests.factories.attacks"])
    started.start()
    yield started
    started.close()


@pytest.fixture
def attack(runner: IsolatedRunner, gpu: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """As those of `tests/unit/test_attacks.py`, of a call on the GPU: answers what it got or was refused with."""
    calls = iter(range(100))

    def run(how: str, target: str = "", number: int = 0) -> Any:
        folder = tmp_path / f"call-{next(calls)}"
        for name in ("work", "out", "in"):
            (folder / name).mkdir(parents=True)
        (folder / "in" / "model.onnx").write_text("a model")
        options = {"how": how, "target": target, "number": number}
        paths = {"model": str(folder / "in")}, str(folder / "work"), str(folder / "out")
        limits = Limits(120, 64 << 30, 1 << 30)
        request = StageRequest("attack", options, *paths, gpu, limits)
        return runner.run(request, on_progress=lambda *_: None, should_stop=lambda: False).data

    return run


def test_the_gpu_is_used(attack: Callable[..., Any], gpu: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    assert [f for f in devices.named("cuda").device_files(gpu) if f.startswith("/dev/nvidia")]
    assert attack("gpu") == {"got": 64.0**3}


@pytest.mark.skipif(not FEATURES.landlock, reason="the kernel has no Landlock")
def test_no_other_file_is_reached(attack: Callable[..., Any], tmp_path: Path) -> None:
    key = tmp_path / "home" / "keys" / "engine.key"
    key.parent.mkdir(parents=True)
    key.write_text("a secret")
    for how in ("read", "linked", "write", "append", "truncate", "remove", "hard_link"):
        assert attack(how, str(key)).get("errno") in REFUSED, how
    assert attack("list", "/tmp").get("errno") in REFUSED
    assert attack("read", "/etc/shadow").get("errno") in REFUSED
    for setting in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/mem"):
        if Path(setting).exists():
            assert attack("write", setting).get("errno") in {*REFUSED, errno.EROFS}, setting
    assert key.read_text() == "a secret"


@pytest.mark.skipif(not FEATURES.seccomp, reason="no seccomp filters")
def test_nothing_is_sent_anywhere(attack: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "redis.sock")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen()
        for how in ("connect", "datagram"):
            assert attack(how, "127.0.0.1", server.getsockname()[1]).get("errno") in REFUSED, how
        assert attack("unix", path).get("errno") in REFUSED
        assert attack("raw").get("errno") in REFUSED
