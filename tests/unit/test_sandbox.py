"""What confines a process, on machines that have less than this one: older Landlock, no namespaces, nothing at all."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.sandbox import syscalls
from app.sandbox.features import NOTHING, Features, found
from app.sandbox.policy import Grounds, Host
from app.sandbox.seccomp import Filter
from app.settings import Settings
from workers.pipeline.confining import Unconfined, check_features, host_of

ROOT = Path(__file__).parents[2]
FEATURES = found()

TRY = """
import json, os, socket, sys
from pathlib import Path
from app.sandbox.confine import confine
from app.sandbox.features import Features
from app.sandbox.policy import Grounds, Host, Policy
told = json.loads(sys.argv[1])
folder, port = Path(told["folder"]), told["port"]
if told["user"]:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
paths = {"inputs": (str(folder / "in"),), "own": (str(folder / "own"),)}
policy = Policy(**paths, loopback=told["loopback"], shared_memory_bytes=1 << 20)
confine(policy, Grounds.of(Host()), Features(**told["features"]))
def serve():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        return "served"
tries = {
    "read": lambda: (folder / "in" / "model").read_text(),
    "own": lambda: (folder / "own" / "a").write_text("1"),
    "cut": lambda: os.truncate(folder / "in" / "model", 0),
    "cut by reading": lambda: os.open(folder / "in" / "model", os.O_RDONLY | os.O_TRUNC),
    "append": lambda: (folder / "in" / "model").open("a"),
    "secret": lambda: (folder / "secret").read_text(),
    "mode": lambda: (folder / "secret").chmod(0o777),
    "service": lambda: socket.create_connection(("127.0.0.1", port)),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "serve": serve,
}
found = {}
for name, attempt in tries.items():
    try:
        found[name] = str(attempt())
    except OSError as error:
        found[name] = -error.errno
print(json.dumps(found))
"""


def _tried(folder: Path, features: Features, port: int, *, loopback: bool, user: bool = False) -> dict[str, Any]:
    folder.chmod(0o755)
    for name in ("in", "own"):
        (folder / name).mkdir()
    (folder / "own").chmod(0o777)
    (folder / "in" / "model").write_text("a model")
    (folder / "secret").write_text("a secret")
    told = {"folder": str(folder), "port": port, "features": vars(features), "loopback": loopback, "user": user}
    command = [sys.executable, "-c", TRY, json.dumps(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert (folder / "in" / "model").read_text() == "a model"
    assert (folder / "secret").stat().st_mode & 0o777 != 0o777
    return result


def _machines() -> list[Features]:
    """This machine, and what it would be with less."""
    less = [replace(FEATURES, landlock=abi) for abi in (1, 2, 3, 4, 6) if abi < FEATURES.landlock]
    return [FEATURES, *(replace(f, namespaces=False) for f in (FEATURES, *less))]


@pytest.mark.skipif(not FEATURES.enough, reason="Landlock and seccomp are needed")
@pytest.mark.parametrize("loopback", [False, True])
@pytest.mark.parametrize("features", _machines(), ids=lambda f: f"landlock-{f.landlock}-{f.namespaces}")
def test_files_and_network_are_closed_on_older_machines(features: Features, loopback: bool, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVICE], stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        port = int(service.stdout.readline())
        told = _tried(tmp_path, features, port, loopback=loopback)
        service.kill()
    assert (told["read"], told["own"], told["mode"]) == ("a model", "1", "None")
    assert [told[name] for name in ("cut", "cut by reading", "append", "secret", "unix")] == [-errno.EACCES] * 5
    if not loopback:
        assert [told[name] for name in ("service", "datagram", "serve")] == [-errno.EACCES] * 3
        return
    assert told["serve"] == "served"
    if features.load_tests == "own":
        assert told["service"] == -errno.ECONNREFUSED, "there is nobody else"
    else:
        assert told["datagram"] == -errno.EACCES
        assert (told["service"] == -errno.EACCES) == (features.load_tests == "ports")


NAME_THREADS = """
import json, os, sys
from pathlib import Path
from app.sandbox import syscalls
from app.sandbox.confine import confine
from app.sandbox.features import Features
from app.sandbox.policy import Grounds, Host, Policy
grounds = Grounds.of(Host())
if sys.argv[2] == "user":
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # which another user's process is again once it starts a program
confine(Policy(names_threads=True, shared_memory_bytes=1 << 20), grounds, Features(**json.loads(sys.argv[1])))
def named():
    name = Path(f"/proc/self/task/{os.getpid()}/comm")
    try:
        name.write_text("cuda")
        return name.read_text().strip()
    except OSError as error:
        return -error.errno
def forked(told):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(told()).encode())
        os._exit(0)
    return json.loads(os.read(read, 100))
def written(path):
    try:
        Path(path).write_text("no number")
    except OSError as error:
        return -error.errno
settings = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity")
print(json.dumps([named(), forked(named), [written(p) for p in settings], written(f"/proc/{os.getppid()}/mem")]))
"""


@pytest.mark.skipif(not FEATURES.enough, reason="Landlock and seccomp are needed")
@pytest.mark.parametrize("user", ["user", "same"])
@pytest.mark.parametrize("features", _machines()[:1] + _machines()[-1:], ids=lambda f: f"{f.landlock}-{f.namespaces}")
def test_threads_are_named_and_settings_stay(features: Features, user: str) -> None:
    """As CUDA does, in processes that were started as well; what the kernel can be told below /proc stays as it is."""
    command = [sys.executable, "-c", NAME_THREADS, json.dumps(vars(features)), user]
    if user == "user" and os.geteuid() != 0:
        pytest.skip("only root can be another user")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own, of_child, settings, memory = json.loads(done.stdout)
    safe = features.namespaces or user == "user" or os.geteuid() != 0
    assert (own, of_child) == ("cuda", "cuda" if safe else -errno.EACCES)
    assert set(settings) <= {-errno.EACCES, -errno.EROFS, -errno.EPERM, -errno.ENOENT}
    assert memory == -errno.EACCES


SERVICE = """
import random, socket
while True:
    try:
        server = socket.create_server(("127.0.0.1", random.randrange(10_000, 32_000)))
        break
    except OSError:
        continue
print(server.getsockname()[1], flush=True)
while True:
    server.accept()
"""


def test_what_a_machine_lacks_is_said() -> None:
    assert Features(7, seccomp=True, namespaces=True, counting=True).missing() == []
    assert "Linux 6.12" in Features(4, seccomp=True, namespaces=True, counting=True).missing()[0]
    assert len(NOTHING.missing()) == 5
    assert (NOTHING.load_tests, NOTHING.enough) == ("open", False)
    assert Features(3, seccomp=True, namespaces=False).load_tests == "tcp"
    told = Features(4, seccomp=True, namespaces=False, counting=True).to_json("auto")
    assert (told["network"], told["network_of_load_tests"], len(told["missing"])) == ("none", "ports", 2)


def test_required_refuses_a_machine_that_has_too_little() -> None:
    check_features(NOTHING, "auto")
    check_features(NOTHING, "off")
    check_features(Features(1, seccomp=True, namespaces=False), "required")
    with pytest.raises(Unconfined, match="Landlock"):
        check_features(NOTHING, "required")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_fits_the_kernel(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, numbers = syscalls._MACHINES[machine]
    monkeypatch.setattr(syscalls, "AUDIT_ARCH", arch)
    monkeypatch.setattr(syscalls, "NUMBERS", numbers)
    assert len(set(numbers.values())) == len(numbers)
    code = Filter(families=(2, 10), packets=True, processes=False).program()
    assert len(code) < 4096
    for place, instruction in enumerate(code):
        kind, if_true, if_false, _value = struct.unpack("<HBBI", instruction)
        if kind & 7 == 5:  # a jump
            assert place + 1 + max(if_true, if_false) < len(code)
    for name, wanted in (("ptrace", errno.EPERM), ("clone3", errno.ENOSYS), ("fchmodat", 0), ("socketpair", None)):
        assert _answer(code, arch, numbers[name], (1, 1)) == wanted, name
    for arguments, wanted in (((1, 1), errno.EACCES), ((1, 5), None), ((2, 1), None), ((2, 2), errno.EACCES)):
        assert _answer(code, arch, numbers["socket"], arguments) == wanted, arguments
    assert _answer(code, arch, numbers["clone"], (0x10000, 0)) is None
    assert _answer(code, arch, numbers["clone"], (17, 0)) == errno.EPERM
    assert _answer(code, arch, 0, (0, 0)) is None
    assert _answer(code, 0x40000003, 0, (0, 0)) == -1, "of another machine: killed"


def _answer(code: list[bytes], arch: int, number: int, arguments: tuple[int, ...]) -> int | None:
    """As the kernel would run it: the error, None where the call is let through, -1 where the process is killed."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *(0,) * (6 - len(arguments)))
    accumulator, place = 0, 0
    while True:
        kind, if_true, if_false, value = struct.unpack("<HBBI", code[place])
        place += 1
        if kind == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif kind == 0x54:
            accumulator &= value
        elif kind == 0x06:
            return None if value == 0x7FFF0000 else -1 if value == 0x80000000 else value & 0xFFFF
        else:
            met = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[kind]
            place += if_true if met else if_false


def test_what_an_installation_hides_is_around_no_ground(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for name in ("home/work", "code"):
        (place / name).mkdir(parents=True)
    (place / "notes").write_text("")
    grounds = Grounds.of(Host(read=(str(place), "/"), hidden=(str(place / "home"),)))
    assert {str(place / "code"), str(place / "notes")} <= set(grounds.read)
    assert not [p for p in grounds.read if Path(p).is_relative_to(place / "home") or p in (str(place), "/")]


def test_settings_say_what_is_hidden(tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path / "home",
        worker={"engine_key_file": tmp_path / "key", "sandbox": "required", "sandbox_read": "/opt/a,/opt/b"},
        storage={"url": f"file://{tmp_path}/blobs"},
        DATABASE_URL=f"sqlite:///{tmp_path}/db",
    )
    host = host_of(settings)
    assert host.mode == "required"
    assert host.read == ("/opt/a", "/opt/b")
    assert {Path(p).name for p in host.hidden} == {"home", "key", "blobs", "db"}
    assert Host.from_json(json.loads(json.dumps(host.to_json()))) == host


OWN_TMP = """
import json, os, sys, tempfile
from pathlib import Path
from app.sandbox.confine import confine
from app.sandbox.features import Features
from app.sandbox.policy import Grounds, Host, Policy
folder, read = map(Path, sys.argv[2:])
policy = Policy(inputs=(str(read),), own=(str(folder),), tmp=str(folder / "tmp"), shared_memory_bytes=1 << 20)
confine(policy, Grounds.of(Host()), Features(**json.loads(sys.argv[1])))
told = {"read": (read / "model").read_text()}
try:
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    (made / "unpacked").write_text("1")
    told |= {"made": made.name, "there": os.listdir("/tmp")}
except OSError as error:
    told["made"] = -error.errno
print(json.dumps(told))
"""


@pytest.mark.skipif(not (FEATURES.enough and FEATURES.namespaces), reason="Landlock, seccomp and namespaces are needed")
@pytest.mark.parametrize("where", ["/var/tmp", "/tmp"])
def test_a_library_that_insists_on_tmp_has_one_of_its_own(where: str) -> None:
    """As AOTInductor's loader does up to torch 2.12. Not where what is read lies in the machine's: a model, or the very
    code, of a checkout there."""
    read_there = any(Path(path).is_relative_to("/tmp") for path in (where, sys.prefix, ROOT, *sys.path))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as own, tempfile.TemporaryDirectory(dir=where) as read:
        (Path(own) / "tmp").mkdir()
        (Path(read) / "model").write_text("a model")
        command = [sys.executable, "-c", OWN_TMP, json.dumps(vars(FEATURES)), own, read]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["read"] == "a model"
        if read_there:
            assert told["made"] == -errno.EACCES
            return
        assert told["there"] == [told["made"]]
        assert (Path(own) / "tmp" / told["made"] / "unpacked").read_text() == "1"
        assert not (Path("/tmp") / told["made"]).exists()
