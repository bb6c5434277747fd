"""Which backends take a model. The API writes the question down, an idle worker answers it, and the answer stays until
the libraries of all live workers are of another version."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import IntegrityError

from app.capabilities.service import CapabilityService
from app.compatibility.repository import ExaminationRepository
from app.db.base import utcnow
from app.db.orm import Examination, SourceModel
from app.db.uow import Database

LEASE = timedelta(seconds=30)
MOST_ATTEMPTS = 3
_LOST = {
    "code": "worker_lost",
    "detail": f"The workers that examined the model were lost or failed, {MOST_ATTEMPTS} times in a row.",
    "remedy": "Ask the operator for the workers' logs.",
}


@dataclass(frozen=True)
class Question:
    """What a worker took on: the model, and the backends to ask."""

    model: SourceModel
    backends: tuple[str, ...]
    owner: str


class CompatibilityService:
    """`ask` is the API's, the rest the workers'."""

    def __init__(self, db: Database, capabilities: CapabilityService) -> None:
        self._db = db
        self._capabilities = capabilities

    def ask(self, model: SourceModel) -> list[Examination]:
        """All answers on this model, and the questions that wait: of every backend that a live worker can ask."""
        tenant_id, model_id = model.tenant_id, model.id
        offered = self._offered(model.format)
        with self._db.read() as session:
            rows = ExaminationRepository(session).of_model(tenant_id, model_id)
        known = {row.backend: row for row in rows}
        wanted = [b for b, versions in offered.items() if b not in known or known[b].version not in versions]
        if not wanted:
            return rows
        try:
            with self._db.write() as uow:
                for backend in wanted:
                    ExaminationRepository(uow.session).ask(tenant_id, model_id, backend, max(offered[backend]))
        except IntegrityError:  # somebody else asked at the same moment
            pass
        with self._db.read() as session:
            return ExaminationRepository(session).of_model(tenant_id, model_id)

    def _offered(self, model_format: str) -> dict[str, set[str]]:
        """Backend → versions that live workers can ask about a model of this format."""
        found: dict[str, set[str]] = {}
        for worker in self._capabilities.live():
            if model_format in worker.formats:
                for backend, version in (worker.hardware.get("examines") or {}).items():
                    found.setdefault(backend, set()).add(version)
        return found

    def take(self, owner: str, backends: Collection[str], formats: Collection[str]) -> Question | None:
        """The oldest question that this worker can answer, held for `LEASE`; None where there is none."""
        with self._db.write() as uow:
            repository = ExaminationRepository(uow.session)
            model = repository.oldest_free(backends, formats)
            if model is None:
                return None
            taken = repository.take(model.id, backends, owner, utcnow() + LEASE)
            lost = [
                row.backend
                for row in repository.of_model(model.tenant_id, model.id)
                if row.backend in taken and row.attempts > MOST_ATTEMPTS
            ]
            if lost:
                ended = {"status": "failed", "error": _LOST, "answered_at": utcnow(), "lease_expires_at": None}
                repository.update(model.id, lost, owner, ended)
        left = tuple(b for b in taken if b not in lost)
        return Question(model, left, owner) if left else None

    def renew(self, question: Question) -> bool:
        """False where somebody else holds it by now, or it is answered."""
        return self._update(question, question.backends, lease_expires_at=utcnow() + LEASE)

    def answer(self, question: Question, backend: str, answer: Mapping[str, Any]) -> None:
        self._end(question, (backend,), status="answered", answer=dict(answer))

    def fail(self, question: Question, backends: Collection[str], error: Mapping[str, Any]) -> None:
        self._end(question, backends, status="failed", error=dict(error))

    def retry_later(self, question: Question, backends: Collection[str]) -> None:
        """Something of the service was in the way; after `MOST_ATTEMPTS` the question is given up."""
        self._update(question, backends, lease_owner=None, lease_expires_at=None)

    def give_back(self, question: Question, backends: Collection[str]) -> None:
        """Somebody else, or this worker later: it counts as no attempt."""
        self._update(question, backends, lease_owner=None, lease_expires_at=None, attempts=Examination.attempts - 1)

    def _end(self, question: Question, backends: Collection[str], **values: Any) -> None:
        self._update(question, backends, **values, answered_at=utcnow(), lease_expires_at=None)

    def _update(self, question: Question, backends: Collection[str], **values: Any) -> bool:
        with self._db.write() as uow:
            repository = ExaminationRepository(uow.session)
            return repository.update(question.model.id, backends, question.owner, values) > 0
