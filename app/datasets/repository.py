"""All SQL on data sets."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.db.orm import Dataset
from app.library import LibraryRepository


class DatasetRepository(LibraryRepository[Dataset]):
    def __init__(self, session: Session) -> None:
        super().__init__(session, Dataset)
