"""Every setting of the service, typed. The only reader of the environment.

The embedded default needs nothing set: SQLite, a blob folder and a file-system broker below `ANNEAL_HOME`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.domain.roles import Role
from app.network import Network, is_loopback


def _split(value: object) -> object:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _pairs(value: object) -> object:
    """`a=b,c=d`, or a JSON object where a value holds a comma."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    pairs = [item.rpartition("=") for item in value.split(",") if item.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write it as VALUE=NAME,VALUE=NAME")
    return {value.strip(): name.strip() for value, _, name in pairs}


def _origin(url: str, variable: str) -> str:
    """An address without what an address of a server does not have. HTTPS, but on this machine."""
    parts = urlsplit(url)
    plain = parts.scheme == "http" and is_loopback(parts.hostname or "")
    if not parts.hostname or not (parts.scheme == "https" or plain) or parts.query or parts.fragment or "@" in url:
        raise ValueError(f"{variable} is an https:// address without a query (http:// on this machine only)")
    return url


# In the environment: separated by commas.
Networks = Annotated[list[Network], NoDecode, BeforeValidator(_split)]
Folders = Annotated[list[Path], NoDecode, BeforeValidator(_split)]
Tenants = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)]
Roles = Annotated[dict[str, Role], NoDecode, BeforeValidator(_pairs)]
Sandbox = Literal["auto", "required", "off"]


class StorageSettings(BaseSettings):
    """`STORAGE_URL`: empty = a folder below the home; `file:///path`; `s3://bucket[/prefix]`."""

    model_config = SettingsConfigDict(env_prefix="STORAGE_", extra="ignore")

    url: str = ""
    s3_endpoint_url: str | None = Field(default=None, validation_alias="S3_ENDPOINT_URL")
    s3_public_endpoint_url: str | None = Field(default=None, validation_alias="S3_PUBLIC_ENDPOINT_URL")
    s3_region: str = Field(default="us-east-1", validation_alias="S3_REGION")
    s3_access_key_id: str | None = Field(default=None, validation_alias="AWS_ACCESS_KEY_ID")
    s3_secret_access_key: SecretStr | None = Field(default=None, validation_alias="AWS_SECRET_ACCESS_KEY")
    presign_seconds: int = Field(default=300, ge=1, le=7 * 24 * 3600)
    presign_part_seconds: int = Field(default=3600, ge=1, le=7 * 24 * 3600)


class LimitSettings(BaseSettings):
    """Limits of what a client may send. Sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="LIMIT_", extra="ignore")

    upload_bytes: int = Field(default=64 << 30, ge=1)
    unpacked_bytes: int = Field(default=128 << 30, ge=1)
    compression_ratio: int = Field(default=200, ge=1)
    archive_members: int = Field(default=10_000, ge=1)
    json_bytes: int = Field(default=1 << 20, ge=1)
    spec_bytes: int = Field(default=128 << 10, ge=1 << 10)
    part_bytes: int = Field(default=64 << 20, ge=5 << 20)
    upload_lease_s: float = Field(default=10, gt=0)
    complete_wait_s: float = Field(default=20, ge=0)
    upload_expires_s: int = Field(default=24 * 3600, ge=1)
    wait_s: float = Field(default=60, ge=0)
    header_bytes: int = Field(default=64 << 10, ge=1 << 10)
    header_count: int = Field(default=100, ge=10)
    header_s: float = Field(default=10, gt=0)
    body_s: float = Field(default=20, gt=0)
    write_s: float = Field(default=60, gt=0)
    connections: int = Field(default=4096, ge=1)
    connections_per_address: int = Field(default=512, ge=0, description="0 = no limit; trusted proxies have none")
    waiting_per_tenant: int = Field(default=500, ge=1)
    inspect_cpu_s: float = Field(default=30, gt=0)
    inspect_memory_mb: int = Field(default=1024, ge=128)
    inspect_sandbox: Sandbox = "auto"
    active_jobs_per_tenant: int = Field(default=1000, ge=1)
    sign_ins_per_minute: int = Field(default=30, ge=0, description="From one address; 0 = no limit")
    wrong_keys_per_minute: int = Field(default=300, ge=0, description="From one address; 0 = no limit")


class WebhookSettings(BaseSettings):
    """How job ends are told to webhooks. `WEBHOOK_SECRET` signs those that jobs name; endpoints have secrets of their
    own, and are disabled when nothing has reached them for `disable_after_h`."""

    model_config = SettingsConfigDict(env_prefix="WEBHOOK_", extra="ignore")

    secret: SecretStr | None = None
    allow_private: bool | None = Field(default=None, description="None = only the embedded default, without keys")
    deny: Networks = Field(default=[], description="Networks never connected to, whatever else is allowed")
    timeout_s: float = Field(default=5, gt=0, le=60)
    max_attempts: int = Field(default=11, ge=1, le=50, description="Of one delivery: the default goes on for a day")
    disable_after_h: float = Field(default=72, gt=0)
    endpoints_per_tenant: int = Field(default=20, ge=0)


class WorkerSettings(BaseSettings):
    """How a worker runs. Times in seconds, memory in MiB."""

    model_config = SettingsConfigDict(env_prefix="WORKER_", extra="ignore")

    name: str = ""
    lease_s: float = Field(default=15.0, gt=0)
    heartbeat_s: float = Field(default=2.0, gt=0)
    sweep_s: float = Field(default=3.0, gt=0)
    redispatch_s: float = Field(default=15.0, gt=0)
    max_attempts: int = Field(default=5, ge=1)
    # Not `tempfile.gettempdir()`: TMPDIR may be another for every user, and workers of all users are to meet here.
    lock_dir: Path = Path("/tmp")  # noqa: S108 (nothing is written there and no link followed: workers/pipeline/machine)
    gpu: str = Field(default="", description="Index or UUID of this worker's GPU; empty = the first visible one")
    engine_key_file: Path | None = Field(default=None, description="None = keys/engine.key below the home")
    stage_timeout_s: float = Field(default=1800, gt=0)
    stage_memory_mb: int = Field(default=0, ge=0, description="0 = 80 % of the machine's memory")
    stage_disk_mb: int = Field(default=64 << 10, ge=1)
    least_free_mb: int = Field(default=256, ge=0, description="With less on its disk, it takes no job")
    sandbox: Sandbox = Field(default="auto", description="Models in children without files, network and others' sight")
    sandbox_read: Folders = Field(default=[], description="Folders that stages may read beside the system and Python")
    tritonserver: Path | None = Field(default=None, description="Bundles for Triton are tried in it; None = not tried")
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Of the worker's own /metrics; 0 = none")
    searches_dir: Path | None = Field(default=None, description="Where searches are recorded; None = nowhere")


class MetricsSettings(BaseSettings):
    """What `/metrics` tells, which anybody may ask who reaches the API."""

    model_config = SettingsConfigDict(env_prefix="METRICS_", extra="ignore")

    tenants: int = Field(default=0, ge=0, le=200, description="So many, by id, those with the most waiting jobs")


class TracingSettings(BaseSettings):
    """Where spans go, by OTLP over HTTP; empty = there are none. The exporter reads the other `OTEL_…` variables."""

    model_config = SettingsConfigDict(env_prefix="OTEL_", extra="ignore")

    exporter_otlp_endpoint: str = ""


class CollectorSettings(BaseSettings):
    """What the collector removes, and when. The grace must be longer than a file waits in storage for its row."""

    model_config = SettingsConfigDict(env_prefix="COLLECT_", extra="ignore")

    every_s: float = Field(default=600, gt=0)
    grace_s: float = Field(default=24 * 3600, ge=0)
    results_days: int = Field(default=30, ge=1)
    idempotency_days: int = Field(default=7, ge=1)
    deliveries_days: int = Field(default=30, ge=1)
    audit_days: int = Field(default=365, ge=1)


class RetentionSettings(BaseSettings):
    """Days after which what users made expires, where a tenant has no policy of its own; None = never."""

    model_config = SettingsConfigDict(env_prefix="RETAIN_", extra="ignore")

    jobs_days: int | None = Field(default=None, ge=1, le=36_500, description="After their end")
    events_days: int | None = Field(default=None, ge=1, le=36_500, description="Of jobs that stay, after their end")
    engines_days: int | None = Field(default=None, ge=1, le=36_500)
    models_days: int | None = Field(default=None, ge=1, le=36_500)
    datasets_days: int | None = Field(default=None, ge=1, le=36_500)
    uploads_days: int | None = Field(default=None, ge=1, le=36_500, description="None = LIMIT_UPLOAD_EXPIRES_S")


class OidcSettings(BaseSettings):
    """An OpenID Connect provider beside API keys; without an issuer there is none. With `audience`, its access tokens
    open the API; with `client_id`, people sign in at it."""

    model_config = SettingsConfigDict(env_prefix="OIDC_", extra="ignore")

    issuer: str = Field(default="", description="Exactly as its discovery document and its tokens have it")
    audience: str = Field(default="", description="Of access tokens for this service; empty = none are taken")
    client_id: str = Field(default="", description="Of the pages; empty = nobody signs in there by it")
    client_secret: SecretStr | None = Field(default=None, description="None = a public client; PKCE in any case")
    cli_client_id: str = Field(default="", description="A public one, for `anneal login --oidc`")
    scopes: str = Field(default="openid profile email", description="Asked for at sign-in")
    tenant_claim: str = Field(default="tenant", min_length=1)
    tenants: Tenants = Field(default={}, description="From the claim's values to tenants; empty = they are the names")
    roles_claim: str = Field(default="roles", min_length=1)
    roles: Roles = {f"anneal-{role.value}": role for role in Role}
    session_s: int = Field(default=8 * 3600, ge=60, le=30 * 24 * 3600)

    @field_validator("issuer")
    @classmethod
    def _is_issuer(cls, value: str) -> str:
        return _origin(value, "OIDC_ISSUER") if value else value

    @field_validator("client_secret")
    @classmethod
    def _is_secret(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is not None and value.get_secret_value() else None

    @model_validator(mode="after")
    def _is_whole(self) -> OidcSettings:
        if not self.issuer and (self.audience or self.client_id):
            raise ValueError("OIDC_AUDIENCE and OIDC_CLIENT_ID need OIDC_ISSUER")
        if self.issuer and not (self.audience or self.client_id):
            raise ValueError("OIDC_ISSUER needs OIDC_AUDIENCE (tokens at the API), OIDC_CLIENT_ID (the pages), or both")
        if self.cli_client_id and not self.audience:
            raise ValueError("OIDC_CLI_CLIENT_ID needs OIDC_AUDIENCE: what it gets are access tokens")
        if "openid" not in self.scopes.split():
            raise ValueError("OIDC_SCOPES holds openid")
        return self


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ANNEAL_", extra="ignore")

    home: Path = Path(".anneal")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    listen_fds: int = Field(default=0, ge=0, le=16, validation_alias="LISTEN_FDS")
    listen_pid: int | None = Field(default=None, validation_alias="LISTEN_PID", description="Whom LISTEN_FDS is for")
    drain_s: float = Field(default=0, ge=0, le=600, description="The API serves on for so long after SIGTERM")
    shutdown_s: float = Field(default=20, ge=0, le=3600, description="Then requests under way have so long to end")
    public_url: str = Field(
        default="", description="Where browsers reach the pages; needed to sign in by OIDC_CLIENT_ID"
    )
    require_keys: bool | None = Field(default=None, description="None = but for the embedded default")
    trusted_proxies: Networks = Field(default=[], description="Whose X-Forwarded-For is believed; nobody else's is")
    log_json: bool | None = Field(default=None, description="None = whenever stderr is not a terminal")
    log_level: str = "INFO"
    database_url: str = Field(default="", validation_alias="DATABASE_URL")
    broker_url: str = Field(default="", validation_alias="BROKER_URL")
    storage: StorageSettings = Field(default_factory=StorageSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)
    collector: CollectorSettings = Field(default_factory=CollectorSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    oidc: OidcSettings = Field(default_factory=OidcSettings)

    @model_validator(mode="after")
    def _fits_the_provider(self) -> Settings:
        if self.public_url:
            self.public_url = _origin(self.public_url, "ANNEAL_PUBLIC_URL").rstrip("/")
            if urlsplit(self.public_url).path:
                raise ValueError("ANNEAL_PUBLIC_URL has no path: the pages stand at the root of their host")
        if self.oidc.client_id and not self.public_url:
            raise ValueError("OIDC_CLIENT_ID needs ANNEAL_PUBLIC_URL: where the provider sends browsers back to")
        if self.oidc.issuer and self.require_keys is False:
            raise ValueError("OIDC_ISSUER and ANNEAL_REQUIRE_KEYS=false exclude each other")
        return self

    @property
    def home_dir(self) -> Path:
        return self.home.expanduser().resolve()

    @property
    def database(self) -> str:
        """SQLAlchemy URL; `postgres://` and `postgresql://` get the psycopg driver."""
        url = self.database_url or f"sqlite:///{self.home_dir / 'anneal.db'}"
        for prefix in ("postgres://", "postgresql://"):
            if url.startswith(prefix):
                return "postgresql+psycopg://" + url[len(prefix) :]
        return url

    @property
    def broker(self) -> str:
        return self.broker_url or "filesystem://localhost/"

    @property
    def broker_dir(self) -> Path:
        return self.home_dir / "broker"

    @property
    def storage_url(self) -> str:
        return self.storage.url or f"file://{self.home_dir / 'blobs'}"

    @property
    def temp_dir(self) -> Path:
        """Scratch space on the same disk as the embedded blob folder, so that storing is a rename."""
        return self.home_dir / "tmp"

    @property
    def hidden(self) -> list[Path]:
        """What no process that handles a user's model ever reads, wherever it lies."""
        key = [self.worker.engine_key_file] if self.worker.engine_key_file else []
        urls = ((self.database, "sqlite:///"), (self.storage_url, "file://"))
        files = [Path(url.removeprefix(scheme)) for url, scheme in urls if url.startswith(scheme)]
        return [self.home_dir, *(path.expanduser().resolve() for path in (*key, *files))]

    @property
    def embedded(self) -> bool:
        """Listening on loopback, with database, broker and storage on this machine's disk: nobody else is meant."""
        return (
            is_loopback(self.host)
            and self.database.startswith("sqlite:")
            and self.broker.startswith("filesystem:")
            and self.storage_url.startswith("file:")
        )

    @property
    def keys_required(self) -> bool:
        return self.require_keys if self.require_keys is not None else bool(self.oidc.issuer) or not self.embedded


def load_settings() -> Settings:
    return Settings()


def child_environment() -> dict[str, str]:
    """The environment of a child process that handles a user's model: no secrets, nothing but what Python needs."""
    keep = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
    return {k: os.environ[k] for k in keep if k in os.environ}
