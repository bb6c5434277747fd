"""A real S3 server for the tests: one node of OpenStack Swift with its S3 API, in a virtual environment of its own.

Swift checks signatures, expiry, checksums and the rules of multipart uploads for real. It needs a file system with
extended attributes and nothing else: no root, no memcached, no database server.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import HOST, ServerFailed, answers, free_port, running, temporary_folder

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).with_name("requirements-s3.txt")
ENVIRONMENT = REPOSITORY / ".venv-s3"
STORAGE_SERVERS = ("account", "container", "object")
_INSTALL_TIMEOUT_S = 240

# One replica on one device, for each of the three kinds of storage server: `sys.argv` is folder, kind=port…
_MAKE_RINGS = """
import sys
from pathlib import Path
from swift.common.ring import RingBuilder
folder = Path(sys.argv[1])
for argument in sys.argv[2:]:
    kind, port = argument.split("=")
    builder = RingBuilder(part_power=2, replicas=1, min_part_hours=1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 100.0,
                     "replication_ip": "127.0.0.1", "replication_port": int(port)})
    builder.rebalance()
    builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
"""

_PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk tempurl s3api tempauth copy slo dlo "
    "versioned_writes symlink proxy-server"
)


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and the credentials of one account on it."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    region: str = "us-east-1"


def swift_python() -> Path:
    """The interpreter of Swift's virtual environment, which is made on first use (about ten seconds)."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "installed"
    want = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    # Two test runs at once must not install into the same folder: the file of the pins is the lock.
    with REQUIREMENTS.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != want:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            _install([sys.executable, "-m", "venv", str(ENVIRONMENT)])
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _install([*pip, "-r", str(REQUIREMENTS)])
            stamp.write_text(want)
    return python


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
        output, failed = done.stdout + done.stderr, done.returncode != 0
    except subprocess.TimeoutExpired as exc:
        output, failed = f"no end after {exc.timeout} s", True
    if failed:
        raise ServerFailed(
            f"The S3 server of the tests (OpenStack Swift, {REQUIREMENTS.name}) could not be installed into "
            f"{ENVIRONMENT.name}. It needs a package registry on its first run.\n{output[-4000:]}"
        )


def _folder_with_attributes() -> Path:
    """A folder for temporary files whose file system keeps extended attributes (older tmpfs does not)."""
    for base in (Path(tempfile.gettempdir()), Path("/var/tmp"), REPOSITORY):
        try:
            with tempfile.NamedTemporaryFile(dir=base) as probe:
                os.setxattr(probe.name, "user.anneal-test", b"1")
            return base
        except OSError:
            continue
    raise ServerFailed("Swift needs a file system with extended attributes; set TMPDIR to a folder on one.")


def _section(name: str, values: Mapping[str, object]) -> str:
    return "\n".join([f"[{name}]", *(f"{k} = {v}" for k, v in values.items()), ""])


def _write_configuration(folder: Path, ports: Mapping[str, int]) -> None:
    common = {"bind_ip": HOST, "workers": 0, "user": getpass.getuser(), "swift_dir": folder, "log_level": "WARNING"}
    constraints = _section("swift-constraints", {"max_file_size": 5368709122})
    hashing = _section("swift-hash", {"swift_hash_path_prefix": "test", "swift_hash_path_suffix": "test"})
    policy = _section("storage-policy:0", {"name": "default", "default": "yes"})
    (folder / "swift.conf").write_text(hashing + policy + constraints)
    for kind in STORAGE_SERVERS:
        disk = {"devices": folder / "disks", "mount_check": "false", "disable_fallocate": "true"}
        (folder / f"{kind}.conf").write_text(
            _section("DEFAULT", {**common, **disk, "bind_port": ports[kind]})
            + _section("pipeline:main", {"pipeline": f"{kind}-server"})
            + _section(f"app:{kind}-server", {"use": f"egg:swift#{kind}", "recon_cache_path": folder})
        )
    extra: dict[str, dict[str, object]] = {
        "tempauth": {"user_test_tester": "testing .admin"},
        "s3api": {
            "location": "us-east-1",
            "s3_acl": "false",
            "auth_pipeline_check": "false",
            "max_upload_part_num": 10000,
        },
        # No memcached: nothing listens on port 1, and Swift goes on without a cache.
        "cache": {"memcache_servers": f"{HOST}:1"},
        "versioned_writes": {"allow_versioned_writes": "true"},
    }
    proxy = _section("DEFAULT", {**common, "bind_port": ports["proxy"]}) + _section(
        "pipeline:main", {"pipeline": _PIPELINE}
    )
    proxy += _section("app:proxy-server", {"use": "egg:swift#proxy", "account_autocreate": "true"})
    for name in _PIPELINE.split()[:-1]:
        egg = {"cache": "memcache"}.get(name, name)
        proxy += _section(f"filter:{name}", {"use": f"egg:swift#{egg}", **extra.get(name, {})})
    (folder / "proxy.conf").write_text(proxy)


def _healthy(endpoint_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint_url}/healthcheck", timeout=2) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as exc:
        exc.close()
        return False
    except OSError:
        return False


@contextmanager
def swift() -> Iterator[S3Server]:
    """A running S3 server; raises `ServerFailed` where it cannot be installed or started."""
    with swift_with_proxy() as (server, proxy), proxy():
        wait_healthy(server.endpoint_url)
        yield server


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    path.mkdir()
    yield


@contextmanager
def swift_with_proxy(
    disk: Callable[[Path], AbstractContextManager[None]] = _folder,
) -> Iterator[tuple[S3Server, Callable[[], AbstractContextManager[subprocess.Popen[bytes]]]]]:
    """An S3 server whose storage runs, and what runs the proxy before it: the process that clients speak to. `disk`:
    makes the folder in which its files lie, for as long as it runs."""
    python = swift_python()
    with temporary_folder("swift", base=_folder_with_attributes()) as folder, ExitStack() as servers:
        ports = {kind: free_port() for kind in (*STORAGE_SERVERS, "proxy")}
        servers.enter_context(disk(folder / "disks"))
        (folder / "disks" / "d1").mkdir()
        _write_configuration(folder, ports)
        rings = [f"{kind}={ports[kind]}" for kind in STORAGE_SERVERS]
        command = [str(python), "-W", "ignore", "-c", _MAKE_RINGS, str(folder), *rings]
        made = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "SWIFT_DIR": str(folder)},
        )
        if made.returncode:
            raise ServerFailed(f"Swift's rings could not be made:\n{made.stderr[-4000:]}")

        def start(kind: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
            server = [python, "-W", "ignore", python.with_name(f"swift-{kind}-server"), folder / f"{kind}.conf"]
            return running(server, log=folder / f"{kind}.log", ready=lambda: True)

        for kind in STORAGE_SERVERS:
            # All start at once; the waiting is below.
            servers.enter_context(start(kind))
        _wait(folder, {kind: ports[kind] for kind in STORAGE_SERVERS})
        yield S3Server(f"http://{HOST}:{ports['proxy']}", "test:tester", "testing"), lambda: start("proxy")


def wait_healthy(endpoint_url: str, timeout_s: float = 60) -> None:
    """Until the proxy answers, and finds its storage."""
    deadline = time.monotonic() + timeout_s
    while not _healthy(endpoint_url):
        if time.monotonic() > deadline:
            raise ServerFailed("Swift's proxy did not get ready.")
        time.sleep(0.05)


def _wait(folder: Path, ports: Mapping[str, int], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not all(answers(port) for port in ports.values()):
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in folder.glob("*.log"))
            raise ServerFailed(f"Swift did not get ready.\n{logs}")
        time.sleep(0.05)
