"""A real OpenID Provider beside API keys: a pipeline's tokens at the API, over a change of keys and the provider's end;
people in a real browser at the pages."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.factories.deployment import Deployment, deployment
from tests.factories.onnx_models import mlp
from tests.integrations.chromium import chromium
from tests.integrations.environments import environment
from tests.integrations.identity_provider import (
    AUDIENCE,
    CLI,
    PAGES,
    SECRET,
    IdentityProvider,
    identity_provider,
    new_keys,
)
from tests.servers import free_port

CHECK = Path(__file__).with_name("oidc_browser_check.py")

pytestmark = pytest.mark.timeout(400)  # with installing


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, IdentityProvider, str]]:
    """A service that trusts the provider, and a key of its tenant."""
    folder = tmp_path_factory.mktemp("oidc")
    public_url = f"http://127.0.0.1:{free_port()}"
    with identity_provider(public_url, folder / "provider.log") as provider:
        variables = {
            "ANNEAL_PUBLIC_URL": public_url,
            "OIDC_ISSUER": provider.issuer,
            "OIDC_AUDIENCE": AUDIENCE,
            "OIDC_CLIENT_ID": PAGES,
            "OIDC_CLIENT_SECRET": SECRET,
            "OIDC_CLI_CLIENT_ID": CLI,
        }
        with deployment(folder / "home", variables, port=int(public_url.rpartition(":")[2])) as deployed:
            yield deployed, provider, deployed.run("app", "create-key", "--tenant", "acme")


def _ask(deployed: Deployment, token: str, path: str = "/v1/tenant", method: str = "GET", **options: Any) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.request(method, deployed.url + path, headers=headers, timeout=30, **options)


def test_a_pipeline_works_with_tokens(trusting: tuple[Deployment, IdentityProvider, str]) -> None:
    deployed, provider, key = trusting
    token = provider.token()
    account = _ask(deployed, token).json()
    assert (account["name"], account["role"], account["subject"]) == ("acme", "submit", "pipeline")
    content = mlp().SerializeToString()
    model = _ask(deployed, token, "/v1/models?filename=a.onnx", "POST", content=content).json()
    assert _ask(deployed, token, model["links"]["self"], "DELETE").status_code == 204
    (event,) = _ask(deployed, key, "/v1/audit?action=model.delete").json()["items"]
    assert (event["actor"], event["resource"]) == ("oidc:pipeline", model["id"])
    assert _ask(deployed, provider.token("other")).json()["code"] == "tenant_missing"
    assert _ask(deployed, provider.token("placeless")).json()["code"] == "tenant_missing"
    looked = deployed.run("app.admin", "--json", "doctor").splitlines()
    told = [json.loads(line) for line in looked]
    assert {"looked_at": "identity provider", "issuer": provider.issuer, "keys": 2} in told

    # Other keys: the service looks for them when the first token comes by one of them
    provider.stop()
    assert _ask(deployed, token).status_code == 200, "its key is known"
    provider.keys = new_keys("second")
    provider.start()
    deadline = time.monotonic() + 60
    while (answer := _ask(deployed, provider.token())).status_code != 200:
        assert answer.status_code in (401, 503), answer.text
        assert time.monotonic() < deadline
        time.sleep(1)
    while (
        _ask(deployed, token).status_code != 401
    ):  # that key was withdrawn; who was let in is remembered for two seconds
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert _ask(deployed, key).status_code == 200


def test_people_sign_in_with_a_browser(trusting: tuple[Deployment, IdentityProvider, str], tmp_path: Path) -> None:
    deployed, provider, _ = trusting
    python, browser = environment("browser") / "bin" / "python", chromium()
    command = [str(python), str(CHECK), browser, deployed.url, provider.issuer, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}\n{deployed.logs()}\n{provider.log.read_text()}"


def test_the_command_line_logs_in_as_a_person(
    trusting: tuple[Deployment, IdentityProvider, str], tmp_path: Path
) -> None:
    deployed, provider, _ = trusting
    variables = {**deployed.environment, "ANNEAL_CONFIG_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    anneal = [sys.executable, "-m", "anneal_client.cli"]
    login = [*anneal, "login", deployed.url, "--oidc"]
    with subprocess.Popen(login, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            link = next(word for line in process.stdout for word in line.split() if word.startswith(provider.issuer))
            python = environment("browser") / "bin" / "python"
            command = [str(python), str(CHECK), chromium(), deployed.url, provider.issuer, str(tmp_path), link]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}\n{provider.log.read_text()}"
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, out + err
    told = subprocess.run([*anneal, "jobs", "--json"], env=variables, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    kept = json.loads((tmp_path / "logins.json").read_text())["tokens"][deployed.url]
    account = _ask(deployed, kept["access_token"]).json()
    assert (account["name"], account["role"], account["subject"]) == ("acme", "admin", "mia")
