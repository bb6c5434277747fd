"""Where the service is and which key it gets: options before the environment, that before what `anneal login` keeps.

A key is kept for one address and sent to no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from anneal_client.cli.exits import Exit, Stop

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


def find(url: str | None, environment: Mapping[str, str] | None = None) -> Place:
    env = os.environ if environment is None else environment
    kept = _read(config_file(env))
    if url is not None:
        address, source = normalized(url), "--url"
    elif env.get("ANNEAL_URL"):
        address, source = normalized(env["ANNEAL_URL"]), "$ANNEAL_URL"
    elif kept.get("default"):
        address, source = normalized(str(kept["default"])), "anneal login"
    else:
        address, source = DEFAULT_URL, "the default"
    if env.get("ANNEAL_API_KEY"):
        return Place(address, env["ANNEAL_API_KEY"].strip(), source, "$ANNEAL_API_KEY")
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
    kept = _read(path)
    keys = {**_keys(kept), **({url: key} if key else {})}
    if not key:
        keys.pop(url, None)
    _write(path, {"default": url, "keys": keys})
    return path


def forget(url: str) -> bool:
    """Whether there was something to forget."""
    path = config_file()
    kept = _read(path)
    keys = _keys(kept)
    known = url in keys or kept.get("default") == url
    keys.pop(url, None)
    default = None if kept.get("default") == url else kept.get("default")
    if known:
        _write(path, {"default": default, "keys": keys})
    return known


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
