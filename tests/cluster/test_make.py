"""`make cluster` itself: what it says is there, and what it leaves."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil

from tests.servers import answers, free_port, launched, stop


def test_it_says_where_all_is_and_ends_without_a_trace() -> None:
    port = free_port()
    command = [*launched(), sys.executable, "-m", "tests.cluster", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    lines: list[str] = []
    ready, reader = threading.Event(), threading.Thread(target=lambda: _read(process, lines, ready), daemon=True)
    reader.start()
    try:
        assert ready.wait(150), lines
        text = "\n".join(lines)
        key = re.search(r"\bank_[\w-]+", text)
        assert key, text
        url, folder = f"http://127.0.0.1:{port}", re.search(r"^Logs +(\S+)", text, re.MULTILINE)
        assert url in text
        assert folder
        answer = httpx.get(f"{url}/v1/capabilities", headers={"Authorization": f"Bearer {key[0]}"}, timeout=20)
        assert answer.status_code == 200
        assert httpx.get(f"{url}/v1/capabilities", timeout=20).status_code == 401
        again = subprocess.run(command[len(launched()) :], capture_output=True, text=True, check=False, timeout=60)
        assert again.returncode == 1
        assert "PORT=" in again.stdout
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 8
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
        assert not Path(folder[1]).exists()
        assert not answers(port)
    finally:
        stop(process, signal.SIGTERM, patience_s=60)
        reader.join(20)


def _read(process: subprocess.Popen[bytes], lines: list[str], ready: threading.Event) -> None:
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            lines.append(line.decode().rstrip())
            if "Ctrl-C ends" in lines[-1]:
                ready.set()
    ready.set()
