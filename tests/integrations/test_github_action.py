"""`clients/github-action`: its metadata against the published schema, and its steps as GitHub's runner would run them:
the same shell, files for outputs and the summary, expressions put in. No runner of GitHub is here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integrations.conftest import CLIENT, KEPT, MISSED, Service
from tests.integrations.environments import REPOSITORY, environment

ACTION = REPOSITORY / "clients" / "github-action"
_SHELL = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]  # what `shell: bash` is
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")

pytestmark = pytest.mark.timeout(200)


def schema_check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [environment("github-action") / "bin" / "check-jsonschema", "--builtin-schema", "vendor.github-actions"]
    return subprocess.run([*map(str, command), str(path)], capture_output=True, text=True, check=False)


def test_the_metadata_fits_the_published_schema(tmp_path: Path) -> None:
    done = schema_check(ACTION / "action.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    told = yaml.safe_load((ACTION / "action.yml").read_text())
    del told["runs"]["steps"][0]["shell"]
    broken = tmp_path / "action.yml"
    broken.write_text(yaml.safe_dump(told))
    assert schema_check(broken).returncode != 0, "the check finds a step without a shell"


def test_the_example_says_what_the_action_takes() -> None:
    (workflow,) = re.findall(r"```yaml\n(.*?)```", (ACTION / "README.md").read_text(), flags=re.DOTALL)
    (step,) = [s for s in yaml.safe_load(workflow)["jobs"]["optimize"]["steps"] if s.get("id") == "anneal"]
    inputs = yaml.safe_load((ACTION / "action.yml").read_text())["inputs"]
    assert set(step["with"]) <= set(inputs)
    assert {name for name, told in inputs.items() if told.get("required")} <= set(step["with"])


@dataclass
class Runner:
    """As much of GitHub's runner as a composite action sees."""

    folder: Path
    action: dict[str, Any] = field(default_factory=lambda: yaml.safe_load((ACTION / "action.yml").read_text()))
    outputs: dict[str, str] = field(default_factory=dict)
    log: str = ""

    @property
    def summary(self) -> str:
        path = self.folder / "summary.md"
        return path.read_text() if path.exists() else ""

    def run(self, **inputs: str) -> int:
        """The exit code of the first step that failed, or 0. `inputs` with _ for -."""
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        known = self.action["inputs"]
        assert set(given) <= set(known)
        assert {n for n, told in known.items() if told.get("required")} <= set(given)
        values = {f"inputs.{n}": given.get(n, told.get("default", "")) for n, told in known.items()}
        values |= {"runner.temp": str(self.folder), "github.action_path": str(ACTION)}
        for step in self.action["runs"]["steps"]:
            assert not _EXPRESSION.search(step["run"]), "what inputs hold would be run"
            told = {name: _EXPRESSION.sub(lambda m: values[m.group(1)], text) for name, text in step["env"].items()}
            files = {"GITHUB_OUTPUT": self.folder / "output", "GITHUB_STEP_SUMMARY": self.folder / "summary.md"}
            script = self.folder / "step.sh"
            script.write_text(step["run"])
            kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
            done = subprocess.run(
                [*_SHELL, str(script)],
                cwd=self.folder,
                env={**kept, **told, **{n: str(p) for n, p in files.items()}},
                capture_output=True,
                text=True,
                check=False,
            )
            self.log = done.stdout + done.stderr
            if files["GITHUB_OUTPUT"].exists():
                lines = files["GITHUB_OUTPUT"].read_text().splitlines()
                self.outputs = dict(line.split("=", 1) for line in lines)
            if done.returncode:
                return done.returncode
        return 0


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The client as its users get it."""
    folder = tmp_path_factory.mktemp("package")
    python = environment("github-action") / "bin" / "python"
    source = shutil.copytree(CLIENT, folder / "client", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = (python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    build = [*pip, "--wheel-dir", folder, source]
    subprocess.run([str(part) for part in build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return str(wheel)


def test_the_step_tells_the_outcome_and_fails_where_a_limit_is_missed(
    service: Service, package: str, tmp_path: Path
) -> None:
    for name, spec in (("kept", KEPT), ("missed", MISSED)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    runner = Runner(tmp_path / "kept")
    given = {"url": service.url, "model": str(service.model), "package": package, "name": "<b>sum|*"}
    # 3: a busy machine may not be able to prove the gain.
    assert runner.run(**given, spec=str(tmp_path / "kept.json"), accept="3") == 0, runner.log
    assert runner.outputs["exit-code"] in ("0", "3")
    assert runner.outputs["job-id"].startswith("job_")
    assert runner.outputs["engine-id"].startswith("eng_")
    assert float(runner.outputs["speedup"]) > 1
    assert (tmp_path / "kept" / "anneal-bundle.zip").stat().st_size > 0
    assert "<html" in (tmp_path / "kept" / "anneal-report.html").read_text()
    assert "| Speed-up | 1x |" in runner.summary
    assert "<b>" not in runner.summary

    runner = Runner(tmp_path / "missed")
    assert runner.run(**given, spec=str(tmp_path / "missed.json"), accept="3") == 4, runner.log
    assert runner.outputs["verdict"] == "limits missed"
    assert "❌" in runner.summary
    assert "size_mb" in runner.summary
    assert "::error title=Anneal::" in runner.log


def test_what_is_wrong_is_told_in_the_summary(service: Service, package: str, tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    assert runner.run(url=service.url, model="$(touch owned); no.onnx", package=package) not in (0, 3)
    assert "❌" in runner.summary
    assert not (tmp_path / "owned").exists()
