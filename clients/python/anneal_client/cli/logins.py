"""Where the service is and which key it gets: options before the environment, that before what `anneal login` keeps.

A key is kept for one address and sent to no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from anneal_client.cli.device import Tokens, renewed
from anneal_client.cli.exits import Exit, Stop

try:
    import fcntl
except ImportError:  # Windows: two commands at once may both renew a token, and one then has to log in again
    fcntl = None  # type: ignore[assignment]

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Place:
    """`source`: where the address was found, in words; `key_source` where the key was."""

    url: str
    key: str | None
    source: str
    key_source: str


def normalized(url: str) -> str:
    """With a scheme and without a slash at the end. Raises `Stop`."""
    text = url.strip()
    if "://" not in text:
        host = text.split("/")[0].rsplit(":", 1)[0]
        text = ("http://" if host in ("localhost", "127.0.0.1", "[::1]") else "https://") + text
    try:
        found = httpx.URL(text)
        possible = found.scheme in ("http", "https") and bool(found.host)
    except httpx.InvalidURL:
        possible = False
    if not possible:
        remedy = f"Say it as {DEFAULT_URL} or https://anneal.example."
        raise Stop(f"{url[:200]!r} is no address of a service.", where="--url", remedy=remedy, exit=Exit.USAGE)
    return text.rstrip("/")


def address(url: str | None) -> str:
    """Where the service is that a command means."""
    return _address(url, os.environ, _read(config_file()))[0]


def _address(url: str | None, env: Mapping[str, str], kept: Mapping[str, Any]) -> tuple[str, str]:
    """With where it was found, in words."""
    if url is not None:
        return normalized(url), "--url"
    if env.get("ANNEAL_URL"):
        return normalized(env["ANNEAL_URL"]), "$ANNEAL_URL"
    if kept.get("default"):
        return normalized(str(kept["default"])), "anneal login"
    return DEFAULT_URL, "the default"


def find(url: str | None, environment: Mapping[str, str] | None = None) -> Place:
    env = os.environ if environment is None else environment
    kept = _read(config_file(env))
    address, source = _address(url, env, kept)
    if env.get("ANNEAL_API_KEY"):
        return Place(address, env["ANNEAL_API_KEY"].strip(), source, "$ANNEAL_API_KEY")
    if address in _tokens(kept):
        return Place(address, _fresh(address, env), source, "anneal login --oidc")
    key = _keys(kept).get(address)
    return Place(address, key, source, "anneal login" if key else "no key")


def config_file(environment: Mapping[str, str] | None = None) -> Path:
    env = os.environ if environment is None else environment
    given = env.get("ANNEAL_CONFIG_DIR")
    base = Path(given) if given else Path(env.get("XDG_CONFIG_HOME") or "~/.config") / "anneal"
    return base.expanduser() / "logins.json"


def keep(url: str, key: str | None) -> Path:
    """From now on this service is asked, with this key. Nobody else can read the file."""
    path = config_file()
    with _locked(path):
        kept = _read(path)
        keys = {**_keys(kept), **({url: key} if key else {})}
        if not key:
            keys.pop(url, None)
        _write(path, {"default": url, "keys": keys, "tokens": _without(_tokens(kept), url)})
    return path


def keep_tokens(url: str, tokens: Tokens) -> Path:
    """The same with an identity provider's, which are renewed when they end."""
    path = config_file()
    with _locked(path):
        kept = _read(path)
        given = {**_tokens(kept), url: tokens.to_json()}
        _write(path, {"default": url, "keys": _without(_keys(kept), url), "tokens": given})
    return path


def forget(url: str) -> bool:
    """Whether there was something to forget."""
    path = config_file()
    with _locked(path):
        kept = _read(path)
        keys, tokens = _keys(kept), _tokens(kept)
        known = url in keys or url in tokens or kept.get("default") == url
        default = None if kept.get("default") == url else kept.get("default")
        if known:
            _write(path, {"default": default, "keys": _without(keys, url), "tokens": _without(tokens, url)})
    return known


def _fresh(url: str, env: Mapping[str, str]) -> str | None:
    """The access token for a service, renewed where it has ended; the old one where that is not possible: the service
    says what it thinks of it."""
    path = config_file(env)
    with _locked(path):
        kept = _read(path)
        all_tokens = _tokens(kept)
        tokens = Tokens.of(all_tokens.get(url))
        if tokens is None:
            return None
        if tokens.stale() and (new := renewed(tokens)) is not None:
            tokens = new
            _write(path, {**kept, "tokens": {**all_tokens, url: new.to_json()}})
        return tokens.access_token


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One command at a time changes what is kept: a provider takes each refresh token once."""
    if fcntl is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a folder that cannot be written: writing says so
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tokens(kept: Mapping[str, Any]) -> dict[str, Any]:
    found = kept.get("tokens")
    return dict(found) if isinstance(found, Mapping) else {}


def _without(kept: Mapping[str, Any], url: str) -> dict[str, Any]:
    return {k: v for k, v in kept.items() if k != url}


def _keys(kept: Mapping[str, Any]) -> dict[str, str]:
    found = kept.get("keys")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        remedy = "Remove it, and `anneal login` again."
        raise Stop(f"It cannot be read: {error}", where=str(path), remedy=remedy) from error
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        remedy = "Set ANNEAL_CONFIG_DIR to a folder that can be written, or give the key as $ANNEAL_API_KEY."
        raise Stop(f"It cannot be written: {error}", where=str(path), remedy=remedy) from error
