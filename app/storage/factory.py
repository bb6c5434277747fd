"""Chooses the storage by the settings. Nothing connects here: the first call of the store does."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from app.settings import Settings
from app.storage.base import BlobStore
from app.storage.local import LocalStore


def make_store(settings: Settings) -> BlobStore:
    """The store of `settings.storage_url`: `file:///folder` or `s3://bucket[/prefix]`; `ValueError` for another URL."""
    if settings.storage_url.startswith("file://"):
        # Taken as it is, not unquoted: the default is made of the home folder, which may hold any character.
        folder = settings.storage_url.removeprefix("file://")
        if not folder.startswith("/"):
            raise ValueError("STORAGE_URL: a folder is written file:///absolute/path")
        return LocalStore(Path(folder))
    url = urlsplit(settings.storage_url)
    if url.scheme == "s3":
        if not url.netloc or url.query or url.fragment:
            raise ValueError("STORAGE_URL: a bucket is written s3://bucket or s3://bucket/prefix")
        # Only here, so that the embedded default does not load the SDK.
        from app.storage.s3 import S3Store

        return S3Store(url.netloc, url.path.strip("/"), settings.storage)
    raise ValueError(f"STORAGE_URL: unknown scheme {url.scheme!r}; use file:// or s3://")
