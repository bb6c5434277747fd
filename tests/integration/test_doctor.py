"""`anneal-admin doctor` on SQLite and PostgreSQL: what is wrong with rows and blobs is found, and mended where that
loses nothing."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from app.admin import doctor
from app.admin.desk import Desk as AdminDesk
from app.blobs import checkup
from app.blobs.checkup import Checkup, Finding, Trouble
from app.blobs.content import blob_key
from app.blobs.removal import release
from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Blob, Engine, Job, SourceModel, StageResult
from app.settings import CollectorSettings, Settings
from app.storage.base import StoredObject
from tests.integration.conftest import Desk
from tests.integration.test_collector import _age, _engine, _exists_anywhere, _put, _record, _result, _upload
from tests.integration.test_ledger import _claim

_OLD_S = 7200
Doctor = Callable[..., tuple[int, list[dict[str, Any]]]]


def _check(desk: Desk, **options: Any) -> dict[str, Finding]:
    return {f.sha256: f for f in Checkup(desk.db, desk.content, 3600, **options).run()}


def _model(desk: Desk, sha256: str) -> SourceModel:
    model = desk.add_model()
    with desk.db.write() as uow:
        row = uow.session.get_one(SourceModel, model.id)
        row.sha256 = sha256
        return row


def _lose(desk: Desk, sha256: str) -> None:
    desk.content.store.delete(blob_key(LOCAL_TENANT, sha256))


def _overwrite(desk: Desk, sha256: str, text: str) -> None:
    path = desk.content.store.local_path(blob_key(LOCAL_TENANT, sha256))
    assert path is not None
    path.unlink()
    path.write_text(text)


def _well(desk: Desk) -> str:
    """A model that is as it should be, beside what is not."""
    sha256 = _record(desk, "well")
    _model(desk, sha256)
    return sha256


def test_nothing_is_wrong(desk: Desk) -> None:
    _well(desk)
    _put(desk, "young, and to be noted yet")
    _record(desk, "young, and to be needed yet")
    looking = Checkup(desk.db, desk.content, 3600, hashed=True)
    assert [*looking.run()] == []
    assert (looking.looked.rows, looking.looked.files, looking.looked.hashed) == (2, 3, 2)


def test_what_is_lost(desk: Desk) -> None:
    """A cached result is forgotten, to be made again; a model stays lost, and is replaced by whoever uploads it."""
    well = _well(desk)
    model, cached, both = (_record(desk, name) for name in ("model", "cached", "both"))
    row = _model(desk, model)
    _model(desk, both)
    _result(desk, "a", cached)
    _result(desk, "b", both)
    _result(desk, "c", well)
    for sha256 in (model, cached, both):
        _lose(desk, sha256)
    found = _check(desk)
    assert {sha256: f.trouble for sha256, f in found.items()} == dict.fromkeys((model, cached, both), Trouble.MISSING)
    assert found[model].needed_by == (f"model {row.id}",)
    assert found[model].mended is None
    assert {sha256: f.mended for sha256, f in _check(desk, mend=True).items()} == {
        model: False, cached: True, both: False,
    }  # fmt: skip
    assert {*_check(desk, mend=True)} == {model, both}, "nobody else has them"
    with desk.db.read() as session:
        assert session.get(StageResult, (LOCAL_TENANT, "a" * 64)) is None
        assert session.get(StageResult, (LOCAL_TENANT, "c" * 64)) is not None
        assert session.get(Blob, (LOCAL_TENANT, model)) is None
    for name in ("model", "both"):
        _record(desk, name)  # uploaded again
    assert _check(desk) == {}


def test_a_lost_engine_is_told_and_its_results_are_made_again(desk: Desk) -> None:
    engine, bundle = _record(desk, "engine"), _record(desk, "bundle")
    job, well = desk.submit(), _well(desk)
    with desk.db.write() as uow:
        uow.session.add(_engine(job.id, job.model_id, engine, bundle))
        uow.session.get_one(SourceModel, job.model_id).sha256 = well
    _result(desk, "a", engine, bundle)
    _lose(desk, engine)
    (finding,) = _check(desk, mend=True).values()
    assert (finding.sha256, finding.trouble, finding.mended) == (engine, Trouble.MISSING, False)
    assert [by.partition(" ")[0] for by in finding.needed_by] == ["stage", "engine"]
    with desk.db.read() as session:
        assert session.get(StageResult, (LOCAL_TENANT, "a" * 64)) is None
        assert session.query(Engine).count() == 1


def test_what_is_damaged(desk: Desk) -> None:
    short, wrong, cached, row = (_record(desk, name) for name in ("short", "wrong", "cached", "row"))
    for sha256 in (short, wrong, row):
        _model(desk, sha256)
    _result(desk, "a", cached)
    _overwrite(desk, short, "shor")
    _overwrite(desk, wrong, "gnorw")
    _overwrite(desk, cached, "dehcac")
    with desk.db.write() as uow:
        uow.session.get_one(Blob, (LOCAL_TENANT, row)).size_bytes = 1
    sizes = dict.fromkeys((short, row), Trouble.WRONG_SIZE)
    assert {s: f.trouble for s, f in _check(desk).items()} == sizes, "the digests were not asked for"
    found = _check(desk, hashed=True, mend=True)
    assert {s: f.trouble for s, f in found.items()} == {**sizes, **dict.fromkeys((wrong, cached), Trouble.DAMAGED)}
    assert {s for s, f in found.items() if f.mended} == {cached, row}, "the file was whole: its row told another size"
    assert not _exists_anywhere(desk, cached)
    left = _check(desk, hashed=True)
    assert {s: f.trouble for s, f in left.items()} == dict.fromkeys((short, wrong), Trouble.UNVOUCHED)
    for name in ("short", "wrong"):
        path = desk.scratch / "again"
        path.write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        desk.content.put(LOCAL_TENANT, path, digest, trusted=False)  # uploaded again, as no row vouches for it
    assert {s: f.mended for s, f in _check(desk, mend=True).items()} == dict.fromkeys((short, wrong), True)
    assert _check(desk, hashed=True) == {}


def test_what_was_left(desk: Desk) -> None:
    well = _well(desk)
    orphan, row, young = _put(desk, "orphan"), _record(desk, "row"), _put(desk, "young")
    for sha256 in (orphan, row, well):
        _age(desk, sha256, _OLD_S)
    _lose(desk, row)
    assert {s: f.trouble for s, f in _check(desk).items()} == {orphan: Trouble.ORPHAN, row: Trouble.ROW_ONLY}
    assert all(f.mended for f in _check(desk, mend=True).values())
    assert _check(desk) == {}
    assert [_exists_anywhere(desk, s) for s in (orphan, young, well)] == [False, True, True]


def test_many_are_looked_at_range_by_range(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of them, also where it is files alone that are many."""
    monkeypatch.setattr(checkup, "MOST", 30)
    for n in range(40):
        _age(desk, _put(desk, f"orphan {n}"), _OLD_S)
    then = utcnow() - timedelta(days=2)
    with desk.db.write() as uow:
        for n in range(20):
            sha256 = hashlib.sha256(f"{n}".encode()).hexdigest()
            uow.session.add(Blob(tenant_id=LOCAL_TENANT, sha256=sha256, size_bytes=1, created_at=then))
    found = Counter(finding.trouble for finding in Checkup(desk.db, desk.content, 3600).run())
    assert found == {Trouble.ROW_ONLY: 20, Trouble.ORPHAN: 40}


def test_what_comes_and_goes_meanwhile_is_not_wrong(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the look at the rows: a model is stored, and another one is deleted."""
    deleted = _record(desk, "deleted")
    row = _model(desk, deleted)
    store = desk.content.store
    listing = store.list

    def then(prefix: str) -> list[StoredObject]:
        found = [*listing(prefix)]
        if not came:
            came.append(_record(desk, "came"))
            _model(desk, came[0])
            _age(desk, came[0], _OLD_S)
        return found

    came: list[str] = []
    monkeypatch.setattr(store, "list", then)
    assert _check(desk) == {}
    monkeypatch.setattr(store, "list", listing)
    look = Checkup._range

    def gone(self: Checkup, *arguments: str) -> Any:
        found = look(self, *arguments)
        with desk.db.write() as uow:
            uow.session.get_one(SourceModel, row.id).deleted_at = utcnow()
        release(desk.db, desk.content, LOCAL_TENANT, [deleted])
        return found

    monkeypatch.setattr(Checkup, "_range", gone)
    assert _check(desk) == {}
    assert not _exists_anywhere(desk, deleted)


@pytest.fixture
def told(desk: Desk, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """The command; its exit code and what it says in JSON."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        parser = argparse.ArgumentParser()
        doctor.add(parser)
        url = desk.db.engine.url.render_as_string(hide_password=False)
        settings = Settings(home=desk.scratch, collector=CollectorSettings(grace_s=3600), DATABASE_URL=url)
        given = parser.parse_args(arguments)
        capsys.readouterr()
        with AdminDesk(settings, json=True) as admin:
            code = given.run(given, admin)
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


def test_the_command(desk: Desk, told: Doctor) -> None:
    well = _well(desk)
    code, said = told()
    assert (code, [line["files"] for line in said]) == (0, [1])
    for n in range(5):
        _age(desk, _put(desk, f"orphan {n}"), _OLD_S)
    code, said = told("--limit", "2", "--hash")
    assert code == 1
    assert [line["what"] for line in said if "what" in line] == [line["what"] for line in said[:2]]
    (summary,) = (line for line in said if "found" in line)
    assert (summary["problem"], summary["found"], summary["left"]) == ("orphan", 5, 5)
    assert told("--tenant", "tnt_other")[0] == 0
    assert told("--mend")[0] == 0
    assert told()[0] == 0
    _lose(desk, well)
    assert told("--mend")[0] == told()[0] == 1


def test_what_is_stuck(desk: Desk, told: Doctor) -> None:
    job, well = desk.submit(), _well(desk)
    with desk.db.write() as uow:
        uow.session.get_one(SourceModel, job.model_id).sha256 = well
    _claim(desk, job)
    upload = _upload(_record(desk, "upload"), "completed")
    upload.expires_at = utcnow() - timedelta(hours=1)
    with desk.db.write() as uow:
        uow.session.add(upload)
        uow.session.get_one(Job, job.id).lease_expires_at = utcnow() - timedelta(minutes=10)
    code, said = told()
    assert code == 1
    assert {(line["problem"], line["what"]) for line in said if "what" in line} == {
        ("expired_lease", job.id), ("stuck_upload", upload.id),
    }  # fmt: skip
    code, said = told("--mend")
    assert code == 0
    assert all(line["mended"] for line in said if "what" in line)
    assert desk.job(job.id).status == "queued"
    assert told()[0] == 0
