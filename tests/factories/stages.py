"""Stages that misbehave on purpose, for the tests of the isolation around them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from app.domain.failures import model_failure
from workers.kernel import Stage, StageContext, StageOptions, StageResult


class MisbehaveOptions(StageOptions):
    how: Literal[
        "well",
        "crash",
        "hang",
        "memory",
        "shared",
        "fork",
        "daemon",
        "exit",
        "raise",
        "disk",
        "environment",
        "killed",
        "chatter",
        "tell",
        "invalid",
    ]


class Misbehave(Stage[MisbehaveOptions]):
    name = "misbehave"
    Options = MisbehaveOptions

    def run(self, ctx: StageContext, options: MisbehaveOptions) -> StageResult:
        ctx.reporter.progress(0.5, "half-way")
        getattr(self, f"_{options.how}")(ctx)
        (ctx.output("file") / "out.txt").write_text("fine")
        return StageResult(outputs=("file",), data={"environment": sorted(os.environ), "cwd": str(Path.cwd())})

    def _well(self, ctx: StageContext) -> None: ...

    def _environment(self, ctx: StageContext) -> None: ...

    def _crash(self, ctx: StageContext) -> None:
        ctypes.string_at(0)

    def _hang(self, ctx: StageContext) -> None:
        time.sleep(600)

    def _killed(self, ctx: StageContext) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _memory(self, ctx: StageContext) -> None:
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1 << 20)) * 16)

    def _fork(self, ctx: StageContext) -> None:
        """A grandchild that would outlive everybody."""
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (ctx.workspace / "grandchild").write_text(str(process.pid))
        time.sleep(600)

    def _daemon(self, ctx: StageContext) -> None:
        """One that leaves its parent's process group, and goes on when the stage has ended."""
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (ctx.workspace / "grandchild").write_text(str(process.pid))

    def _chatter(self, ctx: StageContext) -> None:
        """Progress for some 40 ms, ten times as often as the reporter lets through."""
        for step in range(40):
            ctx.reporter._last = 0.0  # type: ignore[attr-defined]
            ctx.reporter.progress(step / 40, "working")
            time.sleep(0.001)

    def _tell(self, ctx: StageContext) -> None:
        """Progress without end."""
        for step in range(10_000):
            ctx.reporter.progress(0.5, f"step {step}")
            time.sleep(0.1)

    def _shared(self, ctx: StageContext) -> None:
        """200 MB that six forks share: each sees them, together they take them once."""
        hoard = os.urandom(200_000_000)
        forks = []
        for _ in range(6):
            pid = os.fork()
            if pid == 0:
                time.sleep(1.5 if hoard else 0)
                os._exit(0)
            forks.append(pid)
        for pid in forks:
            os.waitpid(pid, 0)

    def _exit(self, ctx: StageContext) -> None:
        os._exit(3)

    def _invalid(self, ctx: StageContext) -> None:
        raise model_failure("not_this_model", "This model will never do.")

    def _raise(self, ctx: StageContext) -> None:
        raise RuntimeError("what a library might raise")

    def _disk(self, ctx: StageContext) -> None:
        with (ctx.workspace / "big").open("wb") as file:
            for _ in range(64):
                file.write(b"\0" * (1 << 20))
