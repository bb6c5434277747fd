"""All SQL on uploaded models."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.db.orm import SourceModel
from app.library import LibraryRepository


class SourceModelRepository(LibraryRepository[SourceModel]):
    def __init__(self, session: Session) -> None:
        super().__init__(session, SourceModel)
