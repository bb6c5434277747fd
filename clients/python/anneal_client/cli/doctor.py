"""`anneal doctor`: what stands between this terminal and an optimized model, each with what mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from anneal_client.cli import logins
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.reading import mapping, objects
from anneal_client.cli.screen import clean
from anneal_client.cli.service import Service
from anneal_client.errors import AnnealError, ConnectionFailed, Unauthorized

_SKEW_S = 30.0
Found = tuple[str, bool | None, str, str | None]  # what, whether it is well (None: only told), detail, remedy


def add(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check address, key, service and workers; what is wrong and its remedy")
    parser.set_defaults(run=run)


def run(ctx: Context, _: argparse.Namespace) -> Exit:
    found: list[Found] = []
    exit = Exit.OK
    for what, well, detail, remedy in _checks(ctx.url):
        found.append((what, well, detail, remedy))
        if well is False and exit == Exit.OK:
            exit = {"service": Exit.UNREACHABLE, "key": Exit.UNAUTHORIZED}.get(what, Exit.REFUSED)
        if not ctx.json:
            _show(ctx, found[-1])
    if ctx.json:
        names = ("check", "ok", "detail", "remedy")
        ctx.emit({"checks": [dict(zip(names, line, strict=True)) for line in found], "exit_code": int(exit)})
    return exit


def _show(ctx: Context, found: Found) -> None:
    what, well, detail, remedy = found
    mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("i", "dim")}[well]
    ctx.screen.line(f"  {ctx.screen.paint(mark, style)} {what:<12} {clean(detail)}")
    if remedy:
        ctx.screen.bullet(remedy, "    →")


def _checks(url: str | None) -> Iterator[Found]:
    here = f"anneal-client {version('anneal-client')}, Python {platform.python_version()}"
    yield "client", None, here, None
    yield _local_service()
    try:
        place = logins.find(url)
    except Stop as stop:
        yield "address", False, f"{stop.where}: {stop.what}", stop.remedy
        return
    yield "address", True, f"{place.url} (from {place.source})", None
    with Service(place) as service:
        begun = time.monotonic()
        try:
            response = httpx.get(f"{place.url}/healthz", timeout=10)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            down = Stop.of(ConnectionFailed("connection_failed", str(error) or type(error).__name__), place.url)
            yield "service", False, down.what, down.remedy
            return
        if response.status_code != httpx.codes.OK:
            remedy = "Is this the address of an Anneal service? Is a proxy in between?"
            yield "service", False, f"/healthz answers {response.status_code}", remedy
            return
        yield "service", True, f"answers within {1000 * (time.monotonic() - begun):.0f} ms", None
        yield from _clock(response)
        yield from _guarded(lambda: _key(service))
        yield from _guarded(lambda: _parts(place.url))
        yield from _guarded(lambda: _workers(service))


def _guarded(check: Callable[[], Iterator[Found]]) -> Iterator[Found]:
    try:
        yield from check()
    except AnnealError as error:
        yield "service", False, error.detail, error.remedy
    except (httpx.HTTPError, ValueError) as error:
        yield "service", False, str(error) or type(error).__name__, None


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _local_service() -> Found:
    found = version("anneal")
    torch = "with" if importlib.util.find_spec("torch") else "without"
    detail = found if found == "not installed" else f"{found}, {torch} PyTorch"
    return "anneal serve", None, f"service beside this client: {detail}", None


def _clock(response: httpx.Response) -> Iterator[Found]:
    told = response.headers.get("Date")
    if not told:
        return
    try:
        skew = abs(parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return
    if skew > _SKEW_S:
        yield "clock", False, f"{skew:.0f} s apart from the service's", "Set the clock: signed addresses expire by it."


def _key(service: Service) -> Iterator[Found]:
    place = service.place
    try:
        service.check_key()
    except Unauthorized as error:
        stop = Stop.of(error, place.url)
        yield "key", False, f"{place.key_source}: {stop.what}", stop.remedy
        return
    yield "key", True, f"{place.key_source}" + ("" if place.key else ", and none is wanted"), None


def _parts(url: str) -> Iterator[Found]:
    found = mapping(httpx.get(f"{url}/readyz", timeout=10).json())
    missing = [str(name) for name in found.get("missing") or ()]
    checks = found.get("checks") or {}
    if found.get("status") == "ready":
        yield "parts", True, "database, queue, storage and a worker are there", None
        return
    for name in missing or ["service"]:
        reason = mapping(mapping(checks).get(name)).get("detail")
        yield "parts", False, f"{name} is missing" + (f": {reason}" if reason else ""), _REMEDIES.get(name)


_REMEDIES = {
    "worker": "Start one: `anneal serve` runs one beside the API, `python -m workers` one more.",
    "database": "Start the database, or run `python -m app migrate`; DATABASE_URL says which it is.",
}


def _workers(service: Service) -> Iterator[Found]:
    found = service.client.capabilities()
    hardware = ", ".join(map(str, found.get("hardware") or ())) or "none"
    yield "workers", bool(found.get("workers")), f"{len(found.get('workers') or ())} live, on {hardware}", None
    for worker in objects(found.get("workers")):
        isolation = mapping(worker.get("isolation"))
        if "missing" in isolation:
            open_ = "; ".join(map(str, isolation["missing"])) or "nothing is left open"
            remedy = "What that means: docs/security.md of the service." if isolation["missing"] else None
            yield "isolation", None, f"of models on {worker.get('id')}: {open_}", remedy
    formats = found.get("formats") or ()
    if "pt2" not in formats:
        remedy = "`anneal serve --with torch` adds it where the service runs here."
        yield "formats", None, f"{', '.join(map(str, formats)) or 'none'}: no .pt2, which needs PyTorch", remedy
