"""What hostile code in a stage's process reaches: nothing that is not its own. The worker lives, its next call works.

Where the kernel lacks what a test is about, the test is skipped and says so (`python -m app.sandbox` tells it all).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.failures import FailureKind, StageFailure
from app.sandbox.features import found
from app.sandbox.policy import Host
from app.sandbox.syscalls import NUMBERS
from workers.pipeline import folders
from workers.pipeline.answers import plain_files
from workers.pipeline.folders import remove_tree
from workers.pipeline.isolated import IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest

FEATURES = found()
needs_landlock = pytest.mark.skipif(not FEATURES.landlock, reason="the kernel has no Landlock")
needs_scopes = pytest.mark.skipif(FEATURES.landlock < 6, reason="Landlock 6 is needed (Linux 6.12)")
needs_seccomp = pytest.mark.skipif(not FEATURES.seccomp, reason="no seccomp filters")
needs_namespaces = pytest.mark.skipif(not FEATURES.namespaces, reason="no user namespaces")
REFUSED = {errno.EACCES, errno.EPERM, errno.EXDEV, errno.ENOSYS}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedRunner]:
    os.environ["DATABASE_URL"] = "postgresql://user:secret@host/db"
    found = IsolatedRunner(["tests.factories.attacks"])
    found.start()
    yield found
    found.close()
    del os.environ["DATABASE_URL"]


@pytest.fixture
def attack(runner: IsolatedRunner, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Runs one attack, answers what it got or was refused with; after all of them a harmless call works."""
    calls = iter(range(100))

    def run(how: str, target: str = "", number: int = 0, *, stage: str = "attack", **limits: Any) -> Any:
        return _run(runner, tmp_path / f"call-{next(calls)}", how, target, number, stage=stage, **limits).data

    yield run
    assert run("nothing") == {"got": "nothing"}
    remove_tree(tmp_path)


def _run(
    runner: IsolatedRunner,
    folder: Path,
    how: str,
    target: str = "",
    number: int = 0,
    *,
    stage: str = "attack",
    file_bytes: int = 8 << 20,
    processes: int = 1024,
    seconds: float = 30,
) -> StageOutcome:
    for name in ("work", "out", "in"):
        (folder / name).mkdir(parents=True)
    (folder / "in" / "model.onnx").write_text("a model")
    limits = Limits(seconds, 2 << 30, file_bytes, processes=processes)
    options = {"how": how, "target": target, "number": number}
    inputs = {"model": str(folder / "in")}
    request = StageRequest(stage, options, inputs, str(folder / "work"), str(folder / "out"), {}, limits)
    return runner.run(request, on_progress=lambda *_: None, should_stop=lambda: False)


def _assert_refused(answer: dict[str, Any]) -> None:
    assert answer.get("errno") in REFUSED, answer


# Files


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, Path]:
    """What lies in a home: the key, the database, a blob, and another tenant's workspace."""
    home = tmp_path / "home"
    found = {
        "key": home / "keys" / "engine.key",
        "database": home / "anneal.db",
        "blob": home / "blobs" / "objects" / "tenants" / "t" / "blob",
        "neighbour": home / "work" / "job-1" / "001-build" / "work" / "request.json",
    }
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a secret")
    return found


@needs_landlock
@pytest.mark.parametrize("what", ["key", "database", "blob", "neighbour"])
def test_nobody_else_s_file_is_read_or_changed(what: str, attack: Callable[..., Any], secrets: dict[str, Path]) -> None:
    path = secrets[what]
    before = path.stat()
    for how in ("read", "linked", "write", "append", "truncate", "remove", "hard_link"):
        _assert_refused(attack(how, str(path)))
    _assert_refused(attack("list", str(path.parent)))
    attack("modes", str(path))
    after = path.stat()
    assert path.read_text() == "a secret"
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)


@needs_landlock
def test_its_own_model_is_read_and_not_changed(attack: Callable[..., Any], tmp_path: Path) -> None:
    model = tmp_path / "call-0" / "in" / "model.onnx"
    assert attack("read", str(model)) == {"got": "a model"}
    model = tmp_path / "call-1" / "in" / "model.onnx"
    _assert_refused(attack("append", str(model)))
    _assert_refused(attack("write", str(tmp_path / "call-2" / "in" / "more")))
    assert model.read_text() == "a model"


def test_its_own_files_are_moved_from_folder_to_folder(attack: Callable[..., Any]) -> None:
    """As caches of compilers do (`app.sandbox.moving`)."""
    assert attack("moved") == {"got": "moved"}


@needs_landlock
def test_the_system_is_not_written_to(attack: Callable[..., Any]) -> None:
    for place in (
        "/etc/anneal",
        "/usr/anneal",
        "/tmp/anneal",
        "/proc/sys/kernel/core_pattern",
        "/sys/kernel/uevent_helper",
    ):
        _assert_refused(attack("write", place))
    _assert_refused(attack("read", "/etc/shadow"))
    _assert_refused(attack("list", "/tmp"))


def test_a_home_in_the_place_of_code_stays_hidden(tmp_path: Path) -> None:
    """As with `.anneal` in a checkout, or an environment's own folder."""
    place = tmp_path / "place"
    (place / "home").mkdir(parents=True)
    (place / "home" / "key").write_text("a secret")
    (place / "code.py").write_text("code")
    runner = IsolatedRunner(["tests.factories.attacks"], Host(read=(str(place),), hidden=(str(place / "home"),)))
    try:
        if not FEATURES.landlock:
            pytest.skip("the kernel has no Landlock")
        read = _run(runner, tmp_path / "a", "read", str(place / "code.py"))
        assert read.data == {"got": "code"}
        _assert_refused(dict(_run(runner, tmp_path / "b", "read", str(place / "home" / "key")).data))
    finally:
        runner.close()


# Network


@needs_seccomp
def test_nothing_is_sent_anywhere(attack: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "redis.sock")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen()
        port = server.getsockname()[1]
        for how in ("connect", "datagram"):
            _assert_refused(attack(how, "127.0.0.1", port))
        _assert_refused(attack("unix", path))
        _assert_refused(attack("raw"))


@needs_seccomp
def test_a_stage_that_serves_reaches_itself_and_no_service_of_the_machine(
    attack: Callable[..., Any], tmp_path: Path
) -> None:
    def serving(*arguments: Any) -> Any:
        return attack(*arguments, stage="attack_serving")

    path = str(tmp_path / "postgresql.sock")
    assert serving("serve") == {"got": "hello"}
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as unix:
        server.bind(("127.0.0.1", _service_port()))
        server.listen()
        unix.bind(path)
        unix.listen()
        if FEATURES.load_tests in ("own", "ports"):
            assert serving("connect", "127.0.0.1", server.getsockname()[1])["errno"] in {*REFUSED, errno.ECONNREFUSED}
        if FEATURES.namespaces:
            assert serving("datagram", "192.0.2.1", 53)["errno"] == errno.ENETUNREACH
        else:
            _assert_refused(serving("datagram", "192.0.2.1", 53))
        _assert_refused(serving("unix", path))
        _assert_refused(serving("raw"))


def _service_port() -> int:
    """Of a service: below those that the system hands out."""
    for port in range(10_000, 30_000, 7):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port")


# Processes


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this user."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


@needs_landlock
def test_no_other_process_is_looked_into(attack: Callable[..., Any], bystander: subprocess.Popen[bytes]) -> None:
    for pid in (os.getpid(), bystander.pid):
        for name in ("environ", "mem", "maps"):
            _assert_refused(attack("read", f"/proc/{pid}/{name}"))
        _assert_refused(attack("list", f"/proc/{pid}/root/tmp"))


@needs_scopes
def test_no_other_process_is_signalled(attack: Callable[..., Any], bystander: subprocess.Popen[bytes]) -> None:
    for pid in (os.getpid(), bystander.pid):
        _assert_refused(attack("signal", number=pid))
    assert bystander.poll() is None


@needs_seccomp
@pytest.mark.parametrize(
    "name",
    ["ptrace", "process_vm_readv", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "unshare", "setns",
     "mount", "keyctl", "kexec_load", "open_by_handle_at", "shmget", "init_module", "chroot", "pidfd_getfd"],
)  # fmt: skip
def test_the_kernel_s_dangerous_calls_are_refused(name: str, attack: Callable[..., Any]) -> None:
    _assert_refused(attack("system_call", number=NUMBERS[name]))


@needs_seccomp
def test_nobody_is_traced(attack: Callable[..., Any], bystander: subprocess.Popen[bytes]) -> None:
    _assert_refused(attack("trace", number=bystander.pid))


def test_it_inherits_no_descriptor_and_no_power(attack: Callable[..., Any], tmp_path: Path) -> None:
    held = attack("descriptors")["got"]
    log = str(tmp_path / "call-0" / "work" / "stage.log")
    assert held[:3] == ["/dev/null", log, log]
    assert [h.split(":")[0] for h in held[3:] if not h.startswith("/proc/")] == ["pipe"], "of its progress"
    status = attack("status")["got"]
    if FEATURES.seccomp:
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        reads_any_file = 0b110  # which Landlock overrules
        assert int(status["CapEff"], 16) & ~reads_any_file == 0
        assert int(status["CapBnd"], 16) == 0 or os.geteuid() != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a program of another user")
@needs_landlock
def test_a_setuid_program_gives_no_rights(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    program = place / "id"
    shutil.copyfile(Path(shutil.which("id") or "/usr/bin/id").resolve(), program)
    os.chown(program, 65534, 65534)
    program.chmod(0o4755)
    command = json.dumps([str(program), "-u"])
    assert subprocess.run(json.loads(command), capture_output=True, check=True).stdout.strip() == b"65534"
    runner = IsolatedRunner(["tests.factories.attacks"], Host(read=(str(place),)))
    try:
        assert _run(runner, tmp_path / "a", "run", command).data == {"got": "0"}
    finally:
        runner.close()


def test_a_fork_bomb_is_ended_with_all_that_left_its_session(attack: Callable[..., Any]) -> None:
    with pytest.raises(StageFailure) as ended:
        attack("bomb", processes=60)
    assert (ended.value.code, ended.value.kind) == ("too_many_processes", FailureKind.MODEL)
    bombs = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"os.setsid()" in _bytes(p)]
    assert not bombs


@needs_scopes
def test_a_signal_to_everybody_reaches_itself_only(
    attack: Callable[..., Any], bystander: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    attack("signal_all")  # which leaves out who sends it
    assert bystander.poll() is None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_worker_itself_is_not_looked_into_by_its_own_user() -> None:
    """For kernels without Landlock: what the kernel tells of it is root's, whoever runs it."""
    code = (
        "import os\nfrom app.sandbox.syscalls import hide_from_tracing\n"
        "os.geteuid() or os.setuid(65534)\nhide_from_tracing()\n"
        "print(os.stat('/proc/self/environ').st_uid)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert done.stdout.strip() == b"0"


# Disk


def test_a_disk_is_not_filled_by_many_files(attack: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(StageFailure) as ended:
        attack("fill", file_bytes=64 << 20)
    assert ended.value.code == "storage_full"
    assert folders.usage([tmp_path], 10**6, 1 << 40)[0] < 20 * (64 << 20)


@needs_namespaces
def test_shared_memory_is_its_own_and_has_an_end(attack: Callable[..., Any]) -> None:
    before = {p.name for p in Path("/dev/shm").iterdir()}
    assert attack("write", "/dev/shm/anneal-attack") == {"got": 7}
    assert attack("fill_shared_memory", file_bytes=3 << 30)["errno"] == errno.ENOSPC
    assert "anneal-attack" not in {p.name for p in Path("/dev/shm").iterdir()} - before


def test_a_million_files_are_not_taken(attack: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(folders, "MOST_ENTRIES", 2000)
    monkeypatch.setattr(folders, "_EVERY_S", 0.02)
    with pytest.raises(StageFailure) as ended:
        attack("many", number=1_000_000)
    assert ended.value.code == "storage_full"


def test_folders_without_end_are_removed(attack: Callable[..., Any], tmp_path: Path) -> None:
    attack("deep", number=3000)
    remove_tree(tmp_path / "call-0")
    assert not (tmp_path / "call-0").exists()
    assert not [*tmp_path.glob("*.removed-*")]


# Outputs and results


def _failure(run: Callable[[], Any]) -> StageFailure:
    with pytest.raises(StageFailure) as ended:
        run()
    return ended.value


@pytest.mark.parametrize("how", ["symbolic_output", "symbolic_folder"])
def test_a_link_among_outputs_leads_nowhere(
    how: str, attack: Callable[..., Any], tmp_path: Path, secrets: dict[str, Path]
) -> None:
    target = secrets["key"].parent if how == "symbolic_folder" else secrets["key"]
    attack(how, str(target))
    failure = _failure(lambda: plain_files(tmp_path / "call-0" / "out", "file", 1 << 30, "attack"))
    assert (failure.code, failure.kind) == ("invalid_output", FailureKind.MODEL)


@needs_landlock
def test_no_pipe_and_no_device_is_made(attack: Callable[..., Any]) -> None:
    _assert_refused(attack("fifo"))
    _assert_refused(attack("device"))


@pytest.mark.parametrize(
    "made",
    [
        lambda f: os.mkfifo(f / "fifo"),
        lambda f: (f / "folder").mkdir(),
        lambda f: (f / "two\nlines").touch(),
        lambda f: [(f / str(n)).touch() for n in range(200)],
        lambda f: os.truncate(_touched(f / "large"), 2 << 30),
        lambda f: (f / "out.txt").unlink(),
    ],
    ids=["fifo", "folder", "name", "many", "large", "none"],
)
def test_what_is_no_plain_file_is_no_output(
    made: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.pipeline.answers._MOST_FILES", 200)
    folder = tmp_path / "file"
    folder.mkdir()
    (folder / "out.txt").write_text("fine")
    assert plain_files(tmp_path, "file", 1 << 30, "s") == [folder / "out.txt"]
    made(folder)
    assert _failure(lambda: plain_files(tmp_path, "file", 1 << 30, "s")).code == "invalid_output"


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("name", ["../../neighbour", "/etc", "", ".", "..", "a/b", "a\0b", "x" * 300])
def test_an_output_lies_in_its_folder(name: str, tmp_path: Path) -> None:
    assert _failure(lambda: plain_files(tmp_path, name, 1 << 30, "s")).code == "invalid_output"


GOOD: dict[str, Any] = {"outputs": ["file"], "data": {}, "notes": [], "seconds": 1.0, "reusable": True}


@pytest.mark.parametrize(
    "left",
    [
        "", "nothing", "[]", "1", "null", "[" * 100_000, json.dumps({"outputs": ["file"]}),
        json.dumps({**GOOD, "outputs": "file"}), json.dumps({**GOOD, "outputs": [1]}),
        json.dumps({**GOOD, "data": []}), json.dumps({**GOOD, "notes": [1]}), json.dumps({**GOOD, "seconds": "x"}),
        json.dumps({**GOOD, "seconds": float("inf")}), json.dumps({**GOOD, "data": {"x": float("nan")}}),
        json.dumps({**GOOD, "reusable": 1}), json.dumps({**GOOD, "data": {"x": "\ud800"}}),
        json.dumps({"failure": []}), json.dumps({"failure": {"code": "Bad Code", "detail": "x"}}),
        json.dumps({"failure": {"code": "a", "detail": ["x"]}}),
        json.dumps({"failure": {"code": "a", "detail": "x", "kind": "no such"}}),
    ],
)  # fmt: skip
def test_a_forged_result_is_a_typed_failure(left: str, attack: Callable[..., Any]) -> None:
    failure = _failure(lambda: attack("leave", left))
    assert (failure.code, failure.kind, failure.cacheable) == ("invalid_output", FailureKind.MODEL, False)


def test_a_result_without_end_or_of_another_file_is_not_read(
    attack: Callable[..., Any], secrets: dict[str, Path]
) -> None:
    secrets["key"].write_text(json.dumps({**GOOD, "data": {"a": "secret"}}))
    assert _failure(lambda: attack("leave_link", str(secrets["key"]))).code == "child_lost"
    assert _failure(lambda: attack("leave_sparse", number=1 << 30, file_bytes=2 << 30)).code == "invalid_output"
    assert _failure(lambda: attack("long_log", number=1 << 30, file_bytes=2 << 30)).code == "runtime_crashed"


def test_no_text_is_longer_than_a_page(attack: Callable[..., Any]) -> None:
    left = json.dumps({"failure": {"code": "a", "detail": "x\0" * 100_000, "stage": "s"}})
    failure = _failure(lambda: attack("leave", left))
    assert len(failure.detail) <= 4000
    assert "\0" not in failure.detail


# What the machine lacks


def test_turned_off_it_confines_nothing_and_says_so(tmp_path: Path) -> None:
    runner = IsolatedRunner(["tests.factories.attacks"], Host("off"))
    (tmp_path / "file").write_text("open")
    try:
        assert _run(runner, tmp_path / "a", "read", str(tmp_path / "file")).data == {"got": "open"}
        assert runner.features.to_json("off")["missing"] == ["it is turned off"]
    finally:
        runner.close()


def test_threads_and_locks_of_libraries_go_on(attack: Callable[..., Any]) -> None:
    code = "import multiprocessing as m; q = m.Queue(); q.put(1); print(q.get())"
    assert attack("run", json.dumps([sys.executable, "-c", code])) == {"got": "1"}
