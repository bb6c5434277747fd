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

from workers.kernel import Stage, StageContext, StageOptions, StageResult


class MisbehaveOptions(StageOptions):
    how: Literal["well", "crash", "hang", "memory", "fork", "exit", "raise", "disk", "environment", "killed"]


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

    def _exit(self, ctx: StageContext) -> None:
        os._exit(3)

    def _raise(self, ctx: StageContext) -> None:
        raise RuntimeError("what a library might raise")

    def _disk(self, ctx: StageContext) -> None:
        with (ctx.workspace / "big").open("wb") as file:
            for _ in range(64):
                file.write(b"\0" * (1 << 20))
