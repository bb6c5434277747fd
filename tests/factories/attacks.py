"""A stage whose model has taken it over: what its code then tries."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.kernel import Stage, StageContext, StageOptions, StageResult

# Four hundred processes at most, whatever holds them: a test is to end. Each leaves its parent's session.
_BOMB = """
import os, time
for _ in range(7):
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
time.sleep(100)
"""


class AttackOptions(StageOptions):
    how: str
    target: str = ""
    number: int = 0


class Attack(Stage[AttackOptions]):
    """Answers {"got": what it got} or {"refused": the name of the error}."""

    name = "attack"
    Options = AttackOptions

    def run(self, ctx: StageContext, options: AttackOptions) -> StageResult:
        (ctx.output("file") / "out.txt").write_text("fine")
        attempt: Callable[[StageContext, AttackOptions], Any] = getattr(self, f"_{options.how}")
        try:
            data = {"got": attempt(ctx, options)}
        except OSError as error:
            data = {"refused": type(error).__name__, "errno": error.errno}
        return StageResult(outputs=("file",), data=data)

    def _nothing(self, ctx: StageContext, options: AttackOptions) -> str:
        return "nothing"

    def _gpu(self, ctx: StageContext, options: AttackOptions) -> float:
        """No attack: its device, which it may use."""
        import torch

        ones = torch.ones(64, 64, device="cuda")
        return float((ones @ ones).sum())

    # Files

    def _read(self, ctx: StageContext, options: AttackOptions) -> str:
        return Path(options.target).read_bytes()[:100].decode(errors="replace")

    def _write(self, ctx: StageContext, options: AttackOptions) -> int:
        return Path(options.target).write_text("changed")

    def _append(self, ctx: StageContext, options: AttackOptions) -> None:
        with Path(options.target).open("ab") as file:
            file.write(b"more")

    def _truncate(self, ctx: StageContext, options: AttackOptions) -> None:
        os.truncate(options.target, 0)

    def _list(self, ctx: StageContext, options: AttackOptions) -> list[str]:
        return [path.name for path in Path(options.target).iterdir()]

    def _remove(self, ctx: StageContext, options: AttackOptions) -> None:
        Path(options.target).unlink()

    def _modes(self, ctx: StageContext, options: AttackOptions) -> None:
        """What Landlock does not look at: whoever answers, nothing is changed."""
        Path(options.target).chmod(0o777)
        os.utime(options.target, (1, 1))
        os.chown(options.target, 1, 1)

    def _linked(self, ctx: StageContext, options: AttackOptions) -> str:
        link = ctx.workspace / "link"
        link.symlink_to(options.target)
        return link.read_text()

    def _hard_link(self, ctx: StageContext, options: AttackOptions) -> None:
        os.link(options.target, ctx.output("file") / "linked")

    def _moved(self, ctx: StageContext, options: AttackOptions) -> str:
        """No attack: a file of its own, from one of its folders to another."""
        (ctx.workspace / "made").mkdir()
        (ctx.workspace / "made" / "file").write_text("moved")
        (ctx.workspace / "made" / "file").replace(ctx.workspace / "file")
        return (ctx.workspace / "file").read_text()

    # Network

    def _connect(self, ctx: StageContext, options: AttackOptions) -> str:
        with socket.create_connection((options.target, options.number), timeout=5) as connection:
            return connection.recv(100).decode()

    def _datagram(self, ctx: StageContext, options: AttackOptions) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            return sender.sendto(b"secret", (options.target, options.number))

    def _unix(self, ctx: StageContext, options: AttackOptions) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(options.target)

    def _raw(self, ctx: StageContext, options: AttackOptions) -> None:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()

    # Processes

    def _signal(self, ctx: StageContext, options: AttackOptions) -> None:
        os.kill(options.number, signal.SIGTERM)

    def _signal_all(self, ctx: StageContext, options: AttackOptions) -> None:
        """It kills itself, too."""
        os.kill(-1, signal.SIGKILL)

    def _trace(self, ctx: StageContext, options: AttackOptions) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(16, options.number, 0, 0) < 0:  # PTRACE_ATTACH
            raise OSError(ctypes.get_errno(), "ptrace")
        return 0

    def _system_call(self, ctx: StageContext, options: AttackOptions) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        answer = int(libc.syscall(options.number, 0, 0, 0, 0, 0, 0))
        if answer < 0:
            raise OSError(ctypes.get_errno(), "system call")
        return answer

    def _descriptors(self, ctx: StageContext, options: AttackOptions) -> list[str]:
        """Where those lead to that it was left with."""
        found = []
        for path in sorted(Path("/proc/self/fd").iterdir(), key=lambda path: int(path.name)):
            try:
                found.append(str(path.readlink()))
            except FileNotFoundError:  # that of the listing
                continue
        return found

    def _status(self, ctx: StageContext, options: AttackOptions) -> dict[str, str]:
        return dict(
            line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
        )

    def _run(self, ctx: StageContext, options: AttackOptions) -> str:
        return subprocess.run(json.loads(options.target), capture_output=True, text=True, check=True).stdout.strip()

    def _bomb(self, ctx: StageContext, options: AttackOptions) -> None:
        for _ in range(3):
            subprocess.Popen([sys.executable, "-c", _BOMB])
        time.sleep(600)

    # Disk

    def _fill(self, ctx: StageContext, options: AttackOptions) -> None:
        block = b"x" * (1 << 20)
        for number in range(100_000):
            with (ctx.output("file") / str(number)).open("wb") as file:
                for _ in range(4):
                    file.write(block)
            time.sleep(0.01)  # 400 MB/s at most: the watch looks now and then, and a test's disk is to hold it

    def _fill_shared_memory(self, ctx: StageContext, options: AttackOptions) -> None:
        with Path("/dev/shm/filled").open("wb") as file:
            while True:
                file.write(b"x" * (1 << 20))

    def _many(self, ctx: StageContext, options: AttackOptions) -> None:
        folder = ctx.output("file")
        for number in range(options.number):
            os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY, 0o600))

    def _deep(self, ctx: StageContext, options: AttackOptions) -> None:
        for _ in range(options.number):
            Path("d").mkdir(mode=0o300)
            os.chdir("d")

    # Outputs and results

    def _symbolic_output(self, ctx: StageContext, options: AttackOptions) -> None:
        (ctx.output("file") / "more").symlink_to(options.target)

    def _symbolic_folder(self, ctx: StageContext, options: AttackOptions) -> None:
        (ctx.output("file") / "out.txt").unlink()
        ctx.output("file").rmdir()
        (ctx.outputs / "file").symlink_to(options.target)

    def _fifo(self, ctx: StageContext, options: AttackOptions) -> None:
        os.mkfifo(ctx.output("file") / "fifo")

    def _device(self, ctx: StageContext, options: AttackOptions) -> None:
        os.mknod(ctx.output("file") / "disk", 0o60600, os.makedev(8, 0))

    def _leave(self, ctx: StageContext, options: AttackOptions) -> None:
        """A result of its own, and an end before the real one is written."""
        (ctx.workspace / "result.json").write_text(options.target)
        os._exit(0)

    def _leave_link(self, ctx: StageContext, options: AttackOptions) -> None:
        (ctx.workspace / "result.json").symlink_to(options.target)
        os._exit(0)

    def _leave_sparse(self, ctx: StageContext, options: AttackOptions) -> None:
        with (ctx.workspace / "result.json").open("wb") as file:
            file.truncate(options.number)
        os._exit(0)

    def _long_log(self, ctx: StageContext, options: AttackOptions) -> None:
        os.ftruncate(1, options.number)
        ctypes.string_at(0)


class Serve(Stage[AttackOptions]):
    """The same of a stage that serves on loopback."""

    name = "attack_serving"
    Options = AttackOptions
    loopback = True

    def run(self, ctx: StageContext, options: AttackOptions) -> StageResult:
        if options.how != "serve":
            return Attack().run(ctx, options)
        (ctx.output("file") / "out.txt").write_text("fine")
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()[:2]) as one,
        ):
            other, _ = server.accept()
            with other:
                one.sendall(b"hello")
                return StageResult(("file",), {"got": other.recv(5).decode()})
