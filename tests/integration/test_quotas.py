"""What a plan allows, on both databases: of those who race for the last place one gets it, and GPUs are counted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select, update

from app.blobs.content import sha256_file
from app.blobs.references import keep_result
from app.db.accounts import GpuUse
from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Blob, Job, SourceModel, StageResult
from app.domain.job_state import JobStatus, Trigger
from app.domain.plan import Limits
from app.domain.spec import OptimizationSpec
from app.errors import AppError
from app.inspection.pool import Inspector
from app.jobs.outlook import Outlooks
from app.jobs.repository import JobRepository
from app.jobs.schedule import Offer
from app.library import IncomingFile
from app.source_models.service import SourceModelService
from app.tenants.quotas import Quotas, may_run
from app.tenants.service import TenantService
from app.uploads.service import UploadService
from tests.factories import onnx_models
from tests.factories.statements import statements
from tests.integration.conftest import Desk

_RACERS = 6


def _limit(desk: Desk, **limits: int | None) -> None:
    service = TenantService(desk.db, desk.service.settings.limits)
    service.put_on("local", None, Limits.model_validate(limits), clear=True, actor="test")


def _race(call: Callable[[int], Any]) -> list[str]:
    """The codes of those that were refused; the others passed."""
    together = Barrier(_RACERS)

    def run(n: int) -> str | None:
        together.wait(10)
        try:
            call(n)
        except AppError as error:
            return error.code
        return None

    with ThreadPoolExecutor(_RACERS) as threads:
        return [code for code in threads.map(run, range(_RACERS)) if code is not None]


def test_of_jobs_that_race_as_many_pass_as_may(desk: Desk) -> None:
    spec = OptimizationSpec(model_id=desk.add_model().id)
    _limit(desk, active_jobs=2)
    refused = _race(lambda _: desk.service.submit(LOCAL_TENANT, spec, correlation_id="c", idempotency=None))
    assert refused == ["too_many_jobs"] * (_RACERS - 2)


def test_of_files_that_race_as_many_pass_as_fit(desk: Desk, tmp_path: Path) -> None:
    settings = desk.service.settings
    uploads = UploadService(desk.db, desk.content, settings)
    inspector = Inspector(settings.limits)
    models = SourceModelService(desk.db, desk.content, settings, inspector)
    content = onnx_models.mlp().SerializeToString()
    _limit(desk, stored_bytes=len(content) + 150)

    def send(n: int) -> None:
        if n % 2:
            uploads.create(LOCAL_TENANT, f"u{n}", 100, None, None)
        else:
            path = tmp_path / f"m{n}.onnx"
            path.write_bytes(content + _producer(n))
            file = IncomingFile(path, "m.onnx", sha256_file(path), path.stat().st_size)
            models.create(LOCAL_TENANT, None, file, None)

    try:
        refused = _race(send)
    finally:
        inspector.close()
    assert set(refused) == {"storage_quota"}
    with desk.db.read() as session:
        quotas = Quotas(session, LOCAL_TENANT, settings.limits, lock=False)
        used = quotas.stored_bytes() + quotas.upload_bytes()
        kept = set(session.scalars(select(Blob.sha256)))
    assert 0 < used <= len(content) + 150
    stored = {path.name for path in (desk.scratch / "blobs").rglob("*") if path.is_file() and len(path.name) == 64}
    assert stored == kept, "what was refused is gone"


def test_what_is_only_cached_comes_back_as_a_file_that_counts(desk: Desk, tmp_path: Path) -> None:
    """A model whose file is a stage's output, too (one that export passed through), and that was deleted."""
    path, settings = tmp_path / "m.onnx", desk.service.settings
    path.write_bytes(onnx_models.mlp().SerializeToString())
    content, sha256 = path.read_bytes(), sha256_file(path)
    inspector = Inspector(settings.limits)
    models = SourceModelService(desk.db, desk.content, settings, inspector)

    def send() -> SourceModel:
        path.write_bytes(content)
        return models.create(LOCAL_TENANT, None, IncomingFile(path, "m.onnx", sha256, len(content)), None)[0]

    try:
        model = send()
        _limit(desk, stored_bytes=len(content) - 1)
        assert send().sha256 == sha256, "what counts already takes no further room"
        with desk.db.write() as uow:
            outputs = {"model": [{"name": "m.onnx", "sha256": sha256, "size_bytes": len(content)}]}
            result = StageResult(
                tenant_id=LOCAL_TENANT, key="0" * 64, stage="export", outputs=outputs, data={}, seconds=1.0
            )
            keep_result(uow.session, result)
        for row in models.page(LOCAL_TENANT, limit=9, before=None):
            models.delete(LOCAL_TENANT, row.id)
        with desk.db.read() as session:
            assert session.get(Blob, (LOCAL_TENANT, model.sha256)) is not None, "it is still cached"
        with pytest.raises(AppError) as caught:
            send()
    finally:
        inspector.close()
    assert caught.value.code == "storage_quota"


def _producer(n: int) -> bytes:
    """A model with another producer name: the same network, other bytes."""
    name = f"p{n:03}".encode()
    return bytes([0x12, len(name)]) + name  # ModelProto.producer_name, once more: the last one counts


def test_a_session_that_was_let_in_may_be_completed(desk: Desk, tmp_path: Path) -> None:
    uploads = UploadService(desk.db, desk.content, desk.service.settings)
    upload, _ = uploads.create(LOCAL_TENANT, "u", 3, None, None)
    _limit(desk, stored_bytes=0)
    part = tmp_path / "part"
    part.write_bytes(b"abc")
    uploads.put_part(LOCAL_TENANT, upload.id, 1, part, 3)
    assert uploads.complete(LOCAL_TENANT, upload.id).status == "completed"
    with desk.db.read() as session:
        usage = Quotas(session, LOCAL_TENANT, desk.service.settings.limits, lock=False).usage()
    assert (usage.stored_bytes, usage.upload_bytes) == (3, 0)


def test_whoever_has_room_by_far_is_not_summed_up_exactly(desk: Desk) -> None:
    """What counts is the sum over the digests of all resources; of 100,000 that takes long."""
    with desk.db.write() as uow:
        uow.session.add(Blob(tenant_id=LOCAL_TENANT, sha256="5" * 64, size_bytes=50, created_at=utcnow()))
    settings = desk.service.settings.limits
    for allowed, exactly in ((100, False), (40, True)):
        _limit(desk, stored_bytes=allowed)
        with desk.db.read() as session, statements(desk.db.engine) as sent:
            quotas = Quotas(session, LOCAL_TENANT, settings, lock=False)
            quotas.check_bytes(40)
            assert (quotas.room(model=False, wanted=40) or 0) >= 40
        assert any("engines" in sql for sql, _ in sent) is exactly, sent
    with desk.db.read() as session, pytest.raises(AppError):
        Quotas(session, LOCAL_TENANT, settings, lock=False).check_bytes(41)


def _on_gpu(desk: Desk, queue: str = "anneal.hw.gpu-nvidia-l4") -> Job:
    job = desk.submit()
    with desk.db.write() as uow:
        uow.session.execute(update(Job).where(Job.id == job.id).values(queue=queue))
    return desk.job(job.id)


def _gpu_seconds(desk: Desk) -> float:
    with desk.db.read() as session:
        return Quotas(session, LOCAL_TENANT, desk.service.settings.limits, lock=False).gpu_seconds()


def _backdate(desk: Desk, job_id: str, seconds: float) -> None:
    with desk.db.write() as uow:
        at = utcnow() - timedelta(seconds=seconds)
        uow.session.execute(update(Job).where(Job.id == job_id).values(claimed_at=at))


def test_seconds_on_gpus_are_counted_once_however_an_attempt_ends(desk: Desk) -> None:
    job = _on_gpu(desk)
    claim = desk.claim(job)
    assert claim is not None
    _backdate(desk, job.id, 100)
    assert 100 <= _gpu_seconds(desk) < 110, "while it runs"
    with desk.db.write() as uow:  # given back, by who says how long it was at it
        JobRepository(uow.session).apply(
            job.id, Trigger.RELEASE, source=JobStatus.RUNNING, values={"spent_seconds": 40.0}
        )
    assert _gpu_seconds(desk) == 40
    again = desk.claim(job)
    assert again is not None
    _backdate(desk, job.id, 10)
    desk.ledger.fail(again, {"code": "x", "detail": "x"}, {})
    assert 50 <= _gpu_seconds(desk) < 60
    plain = desk.submit()
    on_cpu = desk.claim(plain)
    assert on_cpu is not None
    _backdate(desk, plain.id, 1000)
    desk.ledger.fail(on_cpu, {"code": "x", "detail": "x"}, {})
    assert 50 <= _gpu_seconds(desk) < 60, "what ran on a CPU does not count"
    with desk.db.write() as uow:
        uow.session.execute(update(GpuUse).values(day=utcnow().date() - timedelta(days=30)))
    assert _gpu_seconds(desk) == 0, "nor does what is past"


def test_a_job_for_a_gpu_is_refused_once_the_seconds_are_used(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    _limit(desk, gpu_seconds=30)
    with desk.db.write() as uow:
        uow.session.add(GpuUse(tenant_id=LOCAL_TENANT, day=utcnow().date(), seconds=30.5))
    desk.submit()
    monkeypatch.setattr("app.jobs.service.on_gpu", lambda queue: True)
    with pytest.raises(AppError) as caught:
        desk.submit()
    assert (caught.value.code, caught.value.status, caught.value.extra["used"]) == ("gpu_quota", 403, 30)


def test_jobs_that_wait_for_a_gpu_are_asked_again_when_their_turn_comes(desk: Desk) -> None:
    """All were let in while there were seconds left."""
    gpu, cpu = "anneal.hw.gpu-nvidia-l4", "anneal.cpu"
    waiting, begun, plain = _on_gpu(desk), _on_gpu(desk), desk.submit()
    offer = Offer("w1", (cpu, gpu))
    first = desk.ledger.claim(offer)
    assert first is not None
    assert first.job_id == waiting.id
    _limit(desk, gpu_seconds=30)
    _backdate(desk, waiting.id, 31)
    capabilities = desk.service.capabilities
    capabilities.report("w1", hostname="h", hardware={}, backends=[], formats=["onnx"], queues=[cpu, gpu], isolation={})
    told = Outlooks(desk.db, capabilities).of(begun.id)
    assert told is not None
    assert (told.position, told.waiting_for is not None and "GPU seconds" in told.waiting_for) == (None, True)
    next_one = desk.ledger.claim(offer)
    assert next_one is not None
    assert next_one.job_id == plain.id, "what needs no GPU waits for nothing"
    assert desk.ledger.waiting(offer) is None
    assert desk.ledger.claim(offer) is None
    assert desk.job(waiting.id).status == "running", "what was begun goes on"
    _limit(desk, gpu_seconds=3000)
    last = desk.ledger.claim(offer)
    assert last is not None
    assert last.job_id == begun.id


def test_no_more_of_a_tenants_jobs_run_than_its_plan_says(desk: Desk) -> None:
    first, second = desk.submit(), desk.submit()
    _limit(desk, running_jobs=1)
    claim = desk.claim(first)
    assert claim is not None
    with desk.db.write() as uow:
        assert not may_run(uow.session, LOCAL_TENANT, 1)
    assert desk.claim(second) is None, "it waits, whatever worker is free"
    assert desk.job(second.id).status == "queued"
    desk.ledger.fail(claim, {"code": "x", "detail": "x"}, {})
    assert desk.claim(second) is not None


def test_a_plan_smaller_than_what_there_is_takes_nothing_away(desk: Desk) -> None:
    jobs = [desk.submit() for _ in range(4)]
    running = [claim for job in jobs[:2] if (claim := desk.claim(job)) is not None]
    spec = OptimizationSpec(model_id=jobs[0].model_id)
    _limit(desk, active_jobs=1, running_jobs=1, model_bytes=0)
    with pytest.raises(AppError) as caught:
        desk.service.submit(LOCAL_TENANT, spec, correlation_id="c", idempotency=None)
    assert (caught.value.code, caught.value.extra["used"], caught.value.extra["allowed"]) == ("too_many_jobs", 4, 1)
    for claim in running:
        desk.ledger.renew(claim)
        assert desk.claim(jobs[2]) is None, "two run, where one may"
        desk.ledger.fail(claim, {"code": "x", "detail": "x"}, {})
    for job in jobs[2:]:  # all that were let in come to their end
        claim = desk.claim(job)
        assert claim is not None
        desk.ledger.fail(claim, {"code": "x", "detail": "x"}, {})
    job, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="c", idempotency=None)
    assert desk.claim(job) is not None, "of a model that is larger than one may be by now"
