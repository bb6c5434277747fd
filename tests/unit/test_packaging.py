"""The images and the compose file, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.capabilities.service import CapabilityService
from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.uow import Database
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
OURS = ("api-1", "api-2", "worker", "migrate", "bucket")
ONE_SHOT = ("migrate", "bucket")
SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|TOKEN")


def variables(text: str) -> list[tuple[str, str]]:
    """Every `${NAME<rest>}` of the file: the name, and what follows it (`:-default`, `:?message`)."""
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    return re.findall(r"(?<!\$)\$\{(\w+)([^}]*)\}", text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "the dev extra brings it"
    result = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_unprivileged_and_carry_no_secret(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    stages = [i for i, line in enumerate(lines) if line.startswith("FROM ")]
    assert len(stages) == 2
    last = lines[stages[-1] :]
    assert any(re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", line) for line in last)
    assert any(line.startswith("HEALTHCHECK ") for line in last)
    assert any("PIP_CONSTRAINT=" in line for line in lines)
    for line in lines:
        if line.startswith(("ENV ", "ARG ", "    ")) and not line.lstrip().startswith("CMD"):
            assert not SECRET.search(line), line
    for line in lines:
        if line.startswith("FROM "):
            assert re.fullmatch(r"FROM [\w/.-]+:[\w.-]+( AS \w+)?", line), "no tag"
            assert ":latest" not in line


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_with_torch_runs_with_a_compiler(path: Path) -> None:
    """Torch Inductor compiles in the worker, not while the image is built."""
    last = path.read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    if re.search(r"^\s*[^#].*pip install .*torch", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(r"apt-get install [^\n]*g\+\+", last)


def test_what_the_images_copy_is_sent_to_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignore.count("*") == 1
    sent = {line[1:] for line in ignore if line.startswith("!")}
    for path in DOCKERFILES:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert {source, source.split("/")[0]} & sent, f"{path.name}: {source}"
    assert not {".git", ".env", ".venv", "tests"} & sent


def test_no_secret_has_a_default(compose: dict[str, Any]) -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    found = variables(text)
    secrets = {name for name, _ in found if SECRET.search(name)}
    assert secrets == {"POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"}
    for name, rest in found:
        assert rest.startswith(":?" if name in secrets else ":-"), f"${{{name}{rest}}}"
    example = (ROOT / "docker" / "env.example").read_text(encoding="utf-8")
    given = dict(re.findall(r"^#?(\w+)=(.*)$", example, re.MULTILINE))
    assert set(given) == {name for name, _ in found}
    assert all(given[name] == "" for name in secrets)
    for service in compose["services"].values():
        for key, value in (service.get("environment") or {}).items():
            if SECRET.search(key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]*\}", str(value)), key


def test_the_service_reads_what_it_is_given(compose: dict[str, Any]) -> None:
    """Every name that the compose file sets is one that the settings read, with the value it has there."""
    environment = {"PATH": os.environ["PATH"]}
    for name in OURS:
        environment |= {
            k: re.sub(r"\$\{(\w+)[^}]*\}", r"\1", v) for k, v in compose["services"][name]["environment"].items()
        }
    environment.pop("PYTHONPATH", None)
    script = """
import json
from app.settings import load_settings
s = load_settings()
storage = s.storage
print(json.dumps([
    s.database, s.broker, s.storage_url, storage.s3_endpoint_url, storage.s3_public_endpoint_url,
    storage.s3_access_key_id, storage.s3_secret_access_key.get_secret_value(),
    s.host, s.port, str(s.home), s.keys_required,
]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [
        "postgresql+psycopg://anneal:POSTGRES_PASSWORD@postgres:5432/anneal",
        "redis://:VALKEY_PASSWORD@valkey:6379/0",
        "s3://anneal",
        "http://s3:8333",
        "S3_PUBLIC_ENDPOINT_URL",
        "S3_ACCESS_KEY_ID",
        "S3_SECRET_ACCESS_KEY",
        "0.0.0.0",
        8000,
        "/var/lib/anneal",
        True,
    ]


def test_everything_waits_for_what_it_needs(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        needs = service.get("depends_on") or {}
        for other, how in needs.items():
            wanted = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, f"{name} → {other}"
        if name in ONE_SHOT:
            assert service["restart"] == "no"
            assert service["healthcheck"] == {"disable": True}
        elif name in OURS:  # the health check stands in the image
            assert {"migrate", "bucket", "postgres", "valkey", "s3"} == set(needs)
        else:
            assert service["healthcheck"]["test"]
    assert set(services["migrate"]["depends_on"]) == {"postgres"}
    assert set(services["bucket"]["depends_on"]) == {"s3"}


def test_containers_are_hardened(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert "network_mode" not in service
        for volume in service.get("volumes") or ():
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (":" not in volume and volume.startswith("/")), f"{name}: {volume}"
        for port in service.get("ports") or ():
            assert re.fullmatch(r"\$\{\w+:-127\.0\.0\.1:\d+\}:\d+", port), "published to the world by default"
        if name in OURS:
            assert service["read_only"] is True
            assert "cap_add" not in service
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", service["image"]), "a version, not a moving tag"


def test_the_worker_health_check_tells_live_from_dead(tmp_path: Path) -> None:
    def healthy() -> bool:
        script = ROOT / "docker" / "worker_health.py"
        return subprocess.run([sys.executable, str(script)], env=environment, check=False).returncode == 0

    environment = {**os.environ, "ANNEAL_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("DATABASE_URL", None)
    settings = Settings(home=tmp_path)
    upgrade(settings.database)
    db = Database(make_engine(settings.database))
    try:
        capabilities = CapabilityService(db, settings)
        for hostname, expected in (("elsewhere", False), (socket.gethostname(), True)):
            for _ in range(5):  # a report is good for seconds, and the script is as slow as the machine
                capabilities.report(
                    f"on-{hostname}", hostname=hostname, hardware={}, backends=[], formats=[], queues=[]
                )
                if (found := healthy()) or not expected:
                    break
            assert found is expected
        capabilities.stopped(f"on-{socket.gethostname()}")
        assert not healthy()
    finally:
        db.close()


def test_the_identities_file_is_json(compose: dict[str, Any]) -> None:
    content = re.sub(r"\$\{(\w+)[^}]*\}", r"\1", compose["configs"]["s3-identities"]["content"])
    (identity,) = json.loads(content)["identities"]
    assert identity["credentials"] == [{"accessKey": "S3_ACCESS_KEY_ID", "secretKey": "S3_SECRET_ACCESS_KEY"}]
    for config in compose["configs"].values():
        assert "file" not in config or (ROOT / config["file"]).is_file()
