"""The models of a chain, in both databases: who uses them is found, and a worker gets all of them."""

from __future__ import annotations

from app.blobs.retention import _used
from app.db.orm import LOCAL_TENANT, SourceModel
from app.domain.spec import OptimizationSpec
from app.library import LibraryRepository
from tests.integration.conftest import Desk


def test_every_model_of_a_chain_is_used_until_the_job_ends(desk: Desk) -> None:
    models = [desk.add_model() for _ in range(4)]
    other = desk.add_model()
    links = [{"model_id": model.id, "connect": {"x": "y"}} for model in models[1:]]
    with desk.db.write() as uow:
        for model in uow.session.query(SourceModel):
            model.outputs = [{"name": "y", "dtype": "float32", "shape": ["n", 4]}]
    spec = OptimizationSpec.model_validate({"model_id": models[0].id, "chain": {"then": links}})
    job, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="test", idempotency=None)
    ids = [model.id for model in models]
    with desk.db.read() as session:
        library = LibraryRepository(session, SourceModel)
        assert [library.active_job(LOCAL_TENANT, i) for i in (*ids, other.id)] == [job.id] * 4 + [None]
        assert _used(session, LOCAL_TENANT, SourceModel) == set(ids)
    claim = desk.claim(job)
    assert claim is not None
    _, loaded, _ = desk.ledger.load(claim)
    assert [model.id for model in loaded] == ids
    desk.service.cancel(LOCAL_TENANT, job.id)
    desk.ledger.cancelled(claim, {})
    with desk.db.read() as session:
        assert _used(session, LOCAL_TENANT, SourceModel) == set()
        assert LibraryRepository(session, SourceModel).active_job(LOCAL_TENANT, ids[1]) is None
