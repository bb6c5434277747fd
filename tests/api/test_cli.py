"""The command line against the real API: lists, refusals, keys, names with markup, a model in two files."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from anneal_client import Client
from anneal_client.cli import logins
from anneal_client.cli.exits import Exit
from anneal_client.cli.main import main
from anneal_client.io import run
from app.db.orm import LOCAL_TENANT, Job
from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from app.tenants import create_key
from app.webhooks.sender import WebhookSender
from tests.api.conftest import report_worker, serving
from tests.api.test_jobs import finish
from tests.factories import chains, onnx_models
from tests.factories.webhooks import deliver_due

Said = tuple[int, str, str]
Anneal = Callable[..., Said]
EVIL = "\x1b]0;owned\x07\u202e"
MARKUP = "<img src=x onerror=alert(1)> |`x`| *[b](//evil)*"


@pytest.fixture(autouse=True)
def nobody_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANNEAL_URL", "ANNEAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANNEAL_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture
def anneal(base_url: str, worker: Services, capsys: pytest.CaptureFixture[str]) -> Anneal:
    """Runs a command; answers exit code, stdout and stderr."""

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(["--url", base_url, *arguments])
        told = capsys.readouterr()
        assert "\x1b" not in told.out + told.err, "nothing here is a terminal"
        return code, told.out, told.err

    return run


@pytest.fixture
def model_file(tmp_path: Path, model_bytes: bytes) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(model_bytes)
    return path


def test_submit_list_look_and_cancel(anneal: Anneal, model_file: Path, tmp_path: Path, dispatched: list[str]) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, input=np.zeros((20, 8), np.float32), labels=np.zeros(20, np.int64))
    wanted = ["--data", str(data), "--max-loss", "1%", "--p99", "20ms", "--on", "cpu", "--idempotency-key", "k"]
    code, out, _ = anneal("optimize", str(model_file), *wanted)
    assert code == Exit.OK
    (job_id,) = dispatched
    assert f"anneal watch {job_id}" in out
    job = json.loads(anneal("job", job_id, "--json")[1])
    assert job["spec"]["validation"]["max_accuracy_loss_percent"] == 1.0
    assert job["spec"]["constraints"]["p99_latency_ms"] == 20
    assert job["spec"]["calibration"]["dataset_id"] == job["spec"]["validation"]["dataset_id"]
    assert job["spec"]["target"]["device"] == "cpu"
    # Uploaded things have ids, and stand for files.
    code, out, _ = anneal("optimize", job["model_id"], "--data", job["spec"]["calibration"]["dataset_id"], "--json")
    assert (code, json.loads(out)["model_id"]) == (0, job["model_id"])
    listed = json.loads(anneal("jobs", "--json", "--limit", "1")[1])
    assert (len(listed["items"]), listed["more"]) == (1, True)
    assert "--all" in anneal("jobs", "--limit", "1")[1]
    assert len(json.loads(anneal("jobs", "--json", "--all")[1])["items"]) == 2
    for command, word in (("models", "float32[batch,8]"), ("datasets", "20"), ("capabilities", "onnxruntime")):
        code, out, _ = anneal(command)
        assert code == 0
        assert word in out
    assert "queued" in anneal("job", job_id)[1]
    assert anneal("cancel", job_id) == (0, f"  {job_id}  cancelled\n", "")
    assert anneal("cancel", job_id)[0] == 0, "what has ended stays as it is"
    assert "none" in anneal("jobs", "--status", "failed")[1]
    assert anneal("delete", job_id, "--with-engines") == (0, f"  {job_id}  deleted\n", "")
    other = json.loads(anneal("jobs", "--json")[1])["items"][0]
    code, _, err = anneal("delete", other["id"])
    assert (code, "Cancel it first" in err) == (1, True)
    anneal("cancel", other["id"])
    assert json.loads(anneal("delete", other["id"], other["model_id"], "--json")[1]) == {
        "deleted": [other["id"], other["model_id"]]
    }
    assert anneal("delete", "upl_1")[0] == 2


def test_a_chain_of_files(anneal: Anneal, tmp_path: Path, base_url: str, dispatched: list[str]) -> None:
    """By the command line, and by the client, which takes files wherever it takes ids."""
    first, second = tmp_path / "encoder.onnx", tmp_path / "head.onnx"
    onnx_models.save(chains.encoder(), first)
    onnx_models.save(chains.head(), second)
    third = onnx_models.save(onnx_models.mlp(features=4), tmp_path / "last.onnx")
    joint = ["--then", str(second), "--connect", "embedding=embedding", "--then", str(third)]
    code, out, err = anneal(
        "optimize", str(first), *joint, "--connect", "input=logits", "--deploy", "ensemble", "--json"
    )
    assert code == Exit.OK, err
    spec = json.loads(out)["spec"]
    assert spec["chain"]["deploy"] == "ensemble"
    assert [link["connect"] for link in spec["chain"]["then"]] == [{"embedding": "embedding"}, {"input": "logits"}]
    for arguments, code, words in (
        (["--then", str(tmp_path / "none.onnx")], 2, "--then"),
        (["--connect", "a=b"], 2, "give the --then that it is of before it"),
        (["--then", str(second), "--connect", "a"], 2, "INPUT=OUTPUT"),
        (["--then", str(second), "--connect", "a=b"], 1, "/chain/then/0/connect/a"),
        (["--deploy", "ensemble"], 1, "/chain/then"),
    ):
        found, out, err = anneal("optimize", str(first), *arguments)
        assert (found, words in out + err) == (code, True), (arguments, out, err)
    with Client(base_url) as client:
        core, wanted = client._core, {"chain": {"then": [{"model_id": second, "connect": {"embedding": "embedding"}}]}}
        prepared = run(core.prepared(first, None, None, wanted))
    assert prepared["chain"]["then"][0]["model_id"].startswith("mdl_")
    assert prepared["chain"]["then"][0]["connect"] == {"embedding": "embedding"}


def test_refusals_say_what_where_and_the_remedy(anneal: Anneal, model_file: Path, tmp_path: Path) -> None:
    pickled, text = tmp_path / "net.pt", tmp_path / "notes.npz"
    pickled.write_bytes(b"\x80\x04N.")
    text.write_text("no data")
    for arguments, exit, words in (
        (["optimize", str(pickled)], 1, ["pickled", "anneal serve --with torch"]),
        (["optimize", str(model_file), "--data", str(text)], 1, ["remedy"]),
        (["optimize", str(tmp_path / "none.onnx")], 2, ["MODEL", "anneal models"]),
        (["optimize", str(model_file), "--data", str(tmp_path / "none.npz")], 2, ["--data", "anneal datasets"]),
        (
            ["optimize", str(model_file), "--on", "cuda"],
            1,
            ["capabilities", "hardware cpu-test; devices cpu; backends"],
        ),
        (["optimize", str(model_file), "--on", "9.9"], 1, ["remedy"]),
        (["optimize", str(model_file), "--metric", "top1"], 1, ["validation data", "/validation/metric"]),
        (["optimize", str(model_file), "--metric", "nonsense"], 1, ["/validation/metric"]),
        (["optimize", str(model_file), "--backend", "nosuch"], 1, ["nosuch", "remedy"]),
        (["optimize", str(model_file), "--webhook", "ftp://x"], 1, ["/webhook/url", "must begin with https://"]),
        (["optimize", str(model_file), "--name", "x" * 300], 1, ["name"]),
        (["job", "job_0"], 1, ["no job", "anneal jobs"]),
        (["report", "job_0"], 1, ["remedy"]),
        (["engines", "pull", "eng_0"], 1, ["anneal engines"]),
        (["watch", "job_0"], 1, ["anneal jobs"]),
        (["compare", "job_0", "job_1"], 1, ["remedy"]),
    ):
        code, out, err = anneal(*arguments)
        assert code == exit, (arguments, err)
        assert "where:" in err, arguments
        assert ("\n  code:    " in err) == (exit == 1), "of docs/errors.md"
        assert all(word in err for word in words), (arguments, err)
        assert "Traceback" not in out + err


def test_a_typo_in_a_spec_file_is_told_what_is_allowed(anneal: Anneal, model_file: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text('{"validaton": {}}')
    code, out, _ = anneal("optimize", str(model_file), "--spec", str(spec), "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"]) == (Exit.REFUSED, "invalid_request")
    assert "/body/validaton" in error["where"]
    assert "did you mean validation?" in error["detail"]


def test_a_model_in_two_files_is_sent_whole(anneal: Anneal, tmp_path: Path, client: httpx.Client) -> None:
    path = onnx_models.save_external(onnx_models.mlp(), tmp_path / "model.onnx", location="model.onnx.data")
    code, out, err = anneal("optimize", str(path), "--json")
    assert code == 0, err
    model = client.get(f"/v1/models/{json.loads(out)['model_id']}").json()
    assert (model["name"], model["format"]) == ("model", "archive")
    (tmp_path / "model.onnx.data").unlink()
    code, _, err = anneal("optimize", str(path))
    assert code == Exit.REFUSED
    assert "model.onnx.data" in err


def test_a_folder_of_shards_is_a_data_set(anneal: Anneal, model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        np.savez(folder / f"{i}.npz", input=np.full((5, 8), i, np.float32))
    code, out, err = anneal("optimize", str(model_file), "--data", str(folder))
    assert code == 0, err
    assert "10 samples" in out


def test_readme_s_upload_takes_what_pytorch_writes(tmp_path: Path, base_url: str) -> None:
    """The command as it stands there, in a folder with a model in one or in two files."""
    root = Path(__file__).resolve().parents[2]
    command = next(line for line in (root / "README.md").read_text().splitlines() if "/v1/models?" in line)
    command = command.partition("#")[0].replace("localhost:8000", base_url.removeprefix("http://"))
    for where, external in (("one", False), ("two", True)):
        folder = tmp_path / where
        folder.mkdir()
        if external:
            onnx_models.save_external(onnx_models.mlp(), folder / "model.onnx", location="model.onnx.data")
        else:
            onnx_models.save(onnx_models.mlp(), folder / "model.onnx")
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
        model = json.loads(done.stdout)
        assert model.get("id", "").startswith("mdl_"), model


def test_names_with_markup_and_control_characters(anneal: Anneal, client: httpx.Client, model_bytes: bytes) -> None:
    """Those that the service refuses, nobody sees; the others are text."""
    for name, status in ((EVIL, 422), (MARKUP, 201)):
        sent = client.post("/v1/models", params={"name": name, "filename": "m.onnx"}, content=model_bytes)
        assert sent.status_code == status
    code, out, _ = anneal("models")
    assert code == 0
    assert all(line.isprintable() for line in out.splitlines())
    assert MARKUP in out
    code, out, _ = anneal("models", "--json")
    assert out.isascii(), "in JSON they are spelled out"


def test_a_failed_job_tells_reason_place_and_remedy(anneal: Anneal, job: dict[str, Any], worker: Services) -> None:
    error = {
        "code": "unsupported_op",
        "detail": "Det is not known",
        "stage": "export",
        "node": "det\x1b[2J",
        "remedy": "Replace it.",
    }
    finish(worker, job["id"])
    with worker.db.write() as uow:
        row = uow.session.get(Job, job["id"])
        assert row is not None
        assert row.tenant_id == LOCAL_TENANT
        row.status, row.error, row.version = "failed", error, row.version + 1
    code, out, _ = anneal("job", job["id"])
    assert code == 0
    for word in ("unsupported_op", "Det is not known", "det\\x1b[2J", "Replace it."):
        assert word in out
    code, out, _ = anneal("watch", job["id"])
    assert code == Exit.FAILED
    assert "Replace it." in out
    code, out, _ = anneal("watch", job["id"], "--json")
    told = json.loads(out)
    assert (code, told["exit_code"], told["verdict"]) == (5, 5, "failed")


def test_patience_ends_before_the_job_does(anneal: Anneal, job: dict[str, Any]) -> None:
    code, _, err = anneal("watch", job["id"], "--timeout", "1s")
    assert code == Exit.UNFINISHED
    assert "goes on" in err
    assert f"anneal cancel {job['id']}" in err


def test_a_cancelled_job_exits_with_8(anneal: Anneal, job: dict[str, Any]) -> None:
    anneal("cancel", job["id"])
    assert anneal("watch", job["id"])[0] == Exit.CANCELLED


def test_thousands_of_jobs_come_a_screen_at_a_time(anneal: Anneal, job: dict[str, Any], worker: Services) -> None:
    with worker.db.write() as uow:
        row = uow.session.get(Job, job["id"])
        assert row is not None
        columns = {c.name: getattr(row, c.name) for c in Job.__table__.columns}
        rows = [{**columns, "id": f"job_{i:032x}"} for i in range(2_000)]
        uow.session.execute(Job.__table__.insert(), rows)
    code, out, _ = anneal("jobs")
    assert (code, len(out.splitlines())) == (0, 23), "head, rule, 20 jobs, that there are more"
    code, out, _ = anneal("jobs", "--limit", "150", "--json")
    assert len({item["id"] for item in json.loads(out)["items"]}) == 150


def test_doctor(anneal: Anneal, base_url: str) -> None:
    code, out, _ = anneal("doctor")
    assert code in (Exit.OK, Exit.REFUSED)  # this API has no broker's worker behind it
    for word in (base_url, "none is wanted", "cpu-test", "anneal serve --with torch", "Linux 6.12"):
        assert word in out


# Keys


@pytest.fixture
def keyed(settings: Settings) -> Iterator[tuple[str, str]]:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url:
        report_worker(app.state.services)
        yield url, create_key(app.state.services.db, "alice", "test")


def test_login_keeps_a_key_that_works(
    keyed: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = keyed
    assert main(["--url", url, "jobs"]) == Exit.UNAUTHORIZED
    assert f"anneal login {url}" in capsys.readouterr().err
    for given, exit in (("", 7), ("ank_wrong", 7), ("two words", 7), (key, 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{given}\n"))
        assert main(["login", url, "--key-stdin"]) == exit, given
        told = capsys.readouterr()
        assert key not in told.out + told.err
    assert main(["jobs"]) == Exit.OK, "from now on without saying where"
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["login", url]) == Exit.UNAUTHORIZED, "nobody is here to type it"
    assert main(["--url", url, "doctor", "--json"]) in (Exit.OK, Exit.REFUSED)
    assert main(["logout", url]) == Exit.OK
    assert logins.find(url).key is None
    monkeypatch.setenv("ANNEAL_API_KEY", key)
    assert main(["--url", url, "models"]) == Exit.OK
    monkeypatch.setenv("ANNEAL_API_KEY", "ank_wrong")
    assert main(["--url", url, "doctor"]) == Exit.UNAUTHORIZED
    assert "$ANNEAL_API_KEY" in capsys.readouterr().out


def test_webhooks_are_made_listed_tested_and_removed(anneal: Anneal, worker: Services) -> None:
    made = json.loads(anneal("webhooks", "add", "http://127.0.0.1:9/", "--event", "job.failed", "--json")[1])
    assert made["secret"].startswith("whsec_")
    hook = made["id"]
    code, out, _ = anneal("webhooks")
    assert (code, hook in out, "job.failed" in out, "enabled" in out, made["secret"] in out) == (
        0,
        True,
        True,
        True,
        False,
    )
    sent = json.loads(anneal("webhooks", "test", hook, "--json")[1])
    assert deliver_due(WebhookSender(worker.db, Settings())) == 0
    out = anneal("webhooks", "deliveries", "--webhook", hook)[1]
    assert sent["id"] in out
    assert "refused" in out
    assert anneal("webhooks", "redeliver", sent["id"])[0] == Exit.OK
    code, out, _ = anneal("webhooks", "rotate", hook, "-q")
    assert out.strip().startswith("whsec_")
    assert out.strip() != made["secret"]
    assert anneal("webhooks", "remove", hook)[0] == Exit.OK
    assert json.loads(anneal("webhooks", "--json")[1])["items"] == []
    assert anneal("webhooks", "test", hook)[0] == Exit.REFUSED
    for bad in (["test", "job_1"], ["add"], ["add", "http://a/", "--event", "job.started"], ["redeliver", "msg"]):
        assert anneal("webhooks", *bad)[0] == Exit.USAGE
    assert anneal("webhooks", "add", "ftp://a/")[0] == Exit.REFUSED
