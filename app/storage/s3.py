"""Objects in a bucket of any S3 server, through boto3.

Memory stays bounded: files go and come in slices, and `open` streams. Objects are never changed once written, so a
download that breaks off goes on where it stopped.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

import boto3
import urllib3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError

from app.db.clock import CLOCK
from app.errors import AppError, storage_full, storage_unavailable
from app.names import content_disposition
from app.settings import StorageSettings
from app.storage.base import BlobNotFound, InvalidUpload, StoredObject, StoredPart
from app.storage.common import (
    check_parts,
    is_key,
    require_regular_file,
    translated_os_errors,
    validate_key,
    validate_part_number,
    validate_prefix,
    validate_range,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CopySourceTypeDef

_MIB = 1 << 20
_TRANSFER = TransferConfig(multipart_threshold=16 * _MIB, multipart_chunksize=16 * _MIB, max_concurrency=4)
_COPY = TransferConfig(multipart_threshold=512 * _MIB, multipart_chunksize=256 * _MIB, max_concurrency=8)
_RESUMES = 3  # of one download
_LONGEST_S = 7 * 24 * 3600  # that a signed URL may last
_NOT_FOUND = frozenset({"NoSuchKey", "NotFound", "404"})
_NO_UPLOAD = frozenset({"NoSuchUpload", "InvalidPart", "InvalidPartOrder", "EntityTooSmall", "MalformedXML"})
# What a full disk, a quota and a size limit are called: S3, MinIO, SeaweedFS and Garage, Ceph, Swift.
_FULL = frozenset(
    {"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "InsufficientCapacity", "EntityTooLarge", "507"}
)
_REFUSED = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken", "401", "403"}
)
_SDK_ERRORS = (ClientError, BotoCoreError, Boto3Error, RetriesExceededError, urllib3.exceptions.HTTPError)


def _translate(exc: Exception) -> Exception:
    """What the contract raises for an error of the SDK."""
    if isinstance(exc, ClientError):
        code = exc.response.get("Error", {}).get("Code", "")
        status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _NOT_FOUND:
            return BlobNotFound()
        if code in _NO_UPLOAD:
            return InvalidUpload(f"The object storage refused the upload ({code}).")
        if code in _FULL or status == 507:
            return storage_full()
        if code in _REFUSED:
            return storage_unavailable(f"The object storage refused the service's credentials ({code}).")
        return storage_unavailable(f"The object storage answered {status} ({code}).")
    # Boto3Error wraps the SDK's errors of a transfer and keeps them as its context only.
    if isinstance(exc, Boto3Error) and isinstance(exc.__context__, ClientError | BotoCoreError):
        return _translate(exc.__context__)
    return storage_unavailable(f"The object storage cannot be reached ({type(exc).__name__}).")


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except _SDK_ERRORS as exc:
        raise _translate(exc) from exc


class S3Store:
    """The storage contract (`app.storage.base.BlobStore`) on S3. Safe for several threads and processes at once.

    The account needs GetObject, PutObject, DeleteObject, AbortMultipartUpload, ListMultipartUploadParts,
    ListBucketMultipartUploads and ListBucket; without the last a missing object looks like a refusal.
    """

    def __init__(self, bucket: str, prefix: str, settings: StorageSettings) -> None:
        """`prefix` stands before every key, "" for none. Nothing connects before the first call."""
        self._bucket = bucket
        self._prefix = f"{validate_key(prefix)}/" if prefix else ""
        self._settings = settings
        # A session of its own: the default one is shared by the process and not safe for threads.
        self._session = boto3.session.Session()
        self._client = self._make_client(settings.s3_endpoint_url)
        # A removal has an end (`app.blobs.content`): what deletes gives up after less than a minute.
        self._deleter = self._make_client(settings.s3_endpoint_url, attempts=2, connect_s=5, read_s=15)
        # Readiness is asked often and must answer soon: no retries.
        self._probe = self._make_client(settings.s3_endpoint_url, attempts=1, connect_s=2, read_s=5)
        self._signer = self._client
        if settings.s3_public_endpoint_url:
            self._signer = self._make_client(settings.s3_public_endpoint_url)
        self._finalizer = weakref.finalize(self, _close, self._client, self._deleter, self._probe, self._signer)

    def _make_client(
        self, endpoint_url: str | None, *, attempts: int = 4, connect_s: float = 5, read_s: float = 60
    ) -> S3Client:
        secret = self._settings.s3_secret_access_key
        config = Config(
            signature_version="s3v4",
            # Bucket names as host names need DNS entries that only the large providers have.
            s3={"addressing_style": "path" if endpoint_url else "auto"},
            retries={"total_max_attempts": attempts, "mode": "standard"},
            connect_timeout=connect_s,
            read_timeout=read_s,
            max_pool_connections=64,
            tcp_keepalive=True,
            # Many S3 servers do not know the trailing checksums that newer SDKs send.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        client: S3Client = self._session.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=self._settings.s3_region,
            # Without a key: the SDK's own chain (instance role, profile).
            aws_access_key_id=self._settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            config=config,
        )
        return client

    def close(self) -> None:
        """Close the connections; also done when the store is collected. Not part of the contract."""
        self._finalizer()

    def _key(self, key: str) -> str:
        return self._prefix + validate_key(key)

    # Objects

    def put_file(self, key: str, path: Path, *, move: bool = False, replace: bool = False) -> None:
        require_regular_file(path)
        if replace or self.size(key) is None:
            with _translated_errors(), translated_os_errors("reading the file"):
                self._client.upload_file(str(path), self._bucket, self._key(key), Config=_TRANSFER)
        if move:
            path.unlink(missing_ok=True)

    def fetch(self, key: str, path: Path) -> None:
        source = self._key(key)
        with translated_os_errors("fetching a file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid4().hex}.part")
            try:
                with _translated_errors(), temporary.open("xb") as sink:
                    self._client.download_fileobj(self._bucket, source, sink, Config=_TRANSFER)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def open(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        validate_range(start, length)
        size = self.size(key)
        if size is None:
            raise BlobNotFound(key)
        stop = size if length is None else min(size, start + length)
        # S3 has no empty range.
        if start >= stop:
            return io.BytesIO()
        return io.BufferedReader(_Download(self._client, self._bucket, self._key(key), start, stop), _MIB)

    def size(self, key: str) -> int | None:
        try:
            with _translated_errors():
                return self._client.head_object(Bucket=self._bucket, Key=self._key(key))["ContentLength"]
        except BlobNotFound:
            return None

    def copy(self, source: str, key: str, *, replace: bool = False) -> None:
        if replace or self.size(key) is None:
            with _translated_errors():
                origin: CopySourceTypeDef = {"Bucket": self._bucket, "Key": self._key(source)}
                self._client.copy(origin, self._bucket, self._key(key), Config=_COPY)

    def delete(self, key: str) -> None:
        with suppress(BlobNotFound), _translated_errors():
            self._deleter.delete_object(Bucket=self._bucket, Key=self._key(key))

    def list(self, prefix: str) -> Iterator[StoredObject]:
        start = self._prefix + validate_prefix(prefix)
        with _translated_errors():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start):
                for found in page.get("Contents", []):
                    key = found["Key"].removeprefix(self._prefix)
                    # What others keep in the bucket is none of our business.
                    if is_key(key):
                        yield StoredObject(key, found["Size"], found["LastModified"])

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002  # the contract
        return None

    def presigned_get(self, key: str, *, filename: str, expires_s: int) -> str | None:
        return self._sign("get_object", expires_s, Key=key, ResponseContentDisposition=content_disposition(filename))

    def check(self) -> None:
        try:
            with _translated_errors():
                self._probe.head_bucket(Bucket=self._bucket)
        except BlobNotFound as exc:
            raise storage_unavailable("The object storage has no such bucket.") from exc

    # Uploads

    def begin_upload(self, key: str) -> str:
        with _translated_errors():
            return self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key(key))["UploadId"]

    def presigned_part(self, key: str, upload_id: str, number: int, *, size_bytes: int, expires_s: int) -> str | None:
        validate_part_number(number)
        # The length is signed: the storage refuses a part of another one.
        return self._sign(
            "upload_part", expires_s, Key=key, UploadId=upload_id, PartNumber=number, ContentLength=size_bytes
        )

    def put_part(self, key: str, upload_id: str, number: int, path: Path) -> StoredPart:
        validate_part_number(number)
        size = require_regular_file(path)
        try:
            with _upload_errors(), translated_os_errors("reading the part"), path.open("rb") as body:
                answer = self._client.upload_part(
                    Bucket=self._bucket, Key=self._key(key), UploadId=upload_id, PartNumber=number, Body=body
                )
        finally:
            path.unlink(missing_ok=True)
        return StoredPart(number, size, _etag(answer["ETag"]))

    def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        found = []
        with _upload_errors():
            pages = self._client.get_paginator("list_parts").paginate(
                Bucket=self._bucket, Key=self._key(key), UploadId=upload_id
            )
            for page in pages:
                found += [StoredPart(p["PartNumber"], p["Size"], _etag(p["ETag"])) for p in page.get("Parts", [])]
        return found

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        total = sum(p.size_bytes for p in parts)
        try:
            ordered = check_parts(parts, self.list_parts(key, upload_id))
            if self.size(key) not in (None, total):
                raise InvalidUpload("Another object stands under this key.")
            # Also where it stands: completing twice is harmless, and aborting what is half completed is not.
            self._join(key, upload_id, ordered)
        except InvalidUpload as exc:
            # The storage knows no such upload, but the object stands: completed by a call whose answer was lost.
            if not (isinstance(exc.__cause__, ClientError) and self.size(key) == total):
                raise

    def _join(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        with _upload_errors():
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key(key),
                UploadId=upload_id,
                MultipartUpload={"Parts": [{"PartNumber": p.number, "ETag": f'"{p.etag}"'} for p in parts]},
            )

    def abort_upload(self, key: str, upload_id: str) -> None:
        with suppress(InvalidUpload), _upload_errors():
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key(key), UploadId=upload_id)

    def abort_uploads(self, key: str) -> None:
        with _translated_errors():
            found = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._key(key)).get("Uploads", [])
        for upload in found:
            if upload["Key"] == self._key(key):
                self.abort_upload(key, upload["UploadId"])

    def _sign(self, method: str, expires_s: int, *, Key: str, **parameters: Any) -> str:  # noqa: N803  # S3's own name
        lasts_s = _lifetime(expires_s)
        with _translated_errors():
            return self._signer.generate_presigned_url(
                method, Params={"Bucket": self._bucket, "Key": self._key(Key), **parameters}, ExpiresIn=lasts_s
            )


def _lifetime(expires_s: int) -> int:
    """What a URL bears so that it ends in `expires_s` by the clock that all share: it counts from when it was signed by
    this machine's clock, and where that is minutes behind, the URL would have expired when it is given away. One that
    is ahead cannot sign a shorter time than a second from its own."""
    return min(max(round(expires_s - CLOCK.off_by()), 1), _LONGEST_S)


@contextmanager
def _upload_errors() -> Iterator[None]:
    """As `_translated_errors`; what is not found then is the upload."""
    try:
        with _translated_errors():
            yield
    except BlobNotFound as exc:
        raise InvalidUpload("There is no such upload.") from exc.__cause__


def _close(*clients: S3Client) -> None:
    for client in clients:
        client.close()


def _etag(value: str) -> str:
    return value.strip('"')


class _Download(io.RawIOBase):
    """The bytes `position`…`stop` of an object; asks again from where it stands when the connection breaks."""

    def __init__(self, client: S3Client, bucket: str, key: str, position: int, stop: int) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._position = position
        self._stop = stop
        self._resumes_left = _RESUMES
        self._body: Any = None
        # Now, so that `open` and not the first `read` says what is wrong.
        with _translated_errors():
            self._connect()

    def _connect(self) -> None:
        wanted = f"bytes={self._position}-{self._stop - 1}"
        self._body = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=wanted)["Body"]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._stop - self._position)
        if not wanted:
            return 0
        data = self._read(wanted)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        while True:
            try:
                with _translated_errors():
                    if self._body is None:
                        self._connect()
                    data: bytes = self._body.read(size)
                if data:
                    return data
                failure: AppError = storage_unavailable("The object storage ended a download too early.")
            except AppError as exc:
                failure = exc
            self._drop()
            if not self._resumes_left:
                raise failure
            self._resumes_left -= 1

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def close(self) -> None:
        self._drop()
        super().close()
