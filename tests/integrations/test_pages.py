"""A person uses the pages in a real browser: signs in, uploads, submits, watches (in two tabs, over a restart of the
API), reads, downloads, cancels, compares. Screenshots of every page stay in the test's folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.factories.deployment import Deployment, deployment, kill
from tests.factories.onnx_models import mlp, save_external
from tests.factories.pace import paced
from tests.integrations.chromium import chromium
from tests.integrations.environments import REPOSITORY, environment

CHECK = Path(__file__).with_name("browser_check.py")
DIGITS = REPOSITORY / "examples" / "digits"


@pytest.mark.timeout(900)  # with installing a browser
def test_a_person_uses_the_pages(tmp_path: Path) -> None:
    python, browser = environment("browser") / "bin" / "python", chromium()
    shots = tmp_path / "screenshots"
    shots.mkdir()
    with deployment(tmp_path / "home", {"ANNEAL_REQUIRE_KEYS": "true"}) as deployed:
        key = deployed.run("app", "create-key", "--tenant", "test")
        deployed.start_worker()
        deployed.wait_ready(60)
        wide = save_external(mlp(), tmp_path / "wide.onnx", location="wide.onnx.data")
        files = [*(str(DIGITS / name) for name in ("model.onnx", "validation.npz")), str(wide)]
        command = [str(python), str(CHECK), browser, deployed.url, key, str(shots), *files, str(paced(40))]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                told = _restart_when_asked(process, deployed)
                out, err = process.communicate(timeout=240)
            finally:
                process.kill()
    assert process.returncode == 0, f"{told}{out}\n{err[-6000:]}\nscreenshots: {shots}"
    assert len(list(shots.glob("*.png"))) > 30


def _restart_when_asked(process: subprocess.Popen[str], deployed: Deployment) -> str:
    """The API is killed and started anew in the middle of a job; what the person's script said first."""
    assert process.stdin is not None
    assert process.stdout is not None
    told = process.stdout.readline()
    if told == "restart\n":
        kill(deployed.processes[0])
        deployed.start_api()
        process.stdin.write("done\n")
        process.stdin.flush()
    return told
