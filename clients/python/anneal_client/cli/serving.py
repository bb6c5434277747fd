"""`anneal serve`: the service itself, where the package `anneal` is installed in the same environment."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anneal_client.cli import values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop

DISTRIBUTION = "anneal"
_EXTRA = re.compile(r"""\bextra\s*==\s*["']([\w.-]+)["']""")
_INSTALL = (
    "Install the service here: `pip install 'anneal[cpu,openvino] @ .'` in its checkout, or a wheel of it: "
    '`pip install "$(ls dist/anneal-*.whl)[cpu,openvino]"`. A service elsewhere is used with --url or `anneal login`.'
)


def add(commands: Any) -> None:
    parser = commands.add_parser("serve", help="run the service here: API and one worker, until Ctrl-C")
    parser.add_argument("--port", type=values.port, help="($ANNEAL_PORT or 8000)")
    parser.add_argument("--host", help="what it listens on ($ANNEAL_HOST or 127.0.0.1)")
    parser.add_argument(
        "--home", type=Path, metavar="FOLDER", help="where it keeps everything ($ANNEAL_HOME or .anneal)"
    )
    parser.add_argument(
        "--with",
        dest="extras",
        action="append",
        type=values.names,
        metavar="EXTRA",
        help="install this first: torch, …",
    )
    parser.set_defaults(run=run)


def run(ctx: Context, args: argparse.Namespace) -> Exit:
    _require_service()
    for extra in dict.fromkeys(name for group in args.extras or () for name in group):
        add_extra(ctx, extra)
    environment = dict(os.environ)
    for name, value in (("PORT", args.port), ("HOST", args.host), ("HOME", args.home)):
        if value is not None:
            environment[f"ANNEAL_{name}"] = str(value)
    # What lies in the current folder is not what is meant by `app`.
    environment["PYTHONSAFEPATH"] = "1"
    command = [sys.executable, "-m", "app", "serve"]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # Ctrl-C and SIGTERM reach it as they would without this command


def _require_service() -> None:
    try:
        importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        what = "The service is not installed beside this client."
        raise Stop(what, where=sys.prefix, remedy=_INSTALL, exit=Exit.REFUSED) from None


def add_extra(ctx: Context, extra: str) -> None:
    """Install what an extra of the service needs and is not here yet, into this environment."""
    wanted = requirements_of(extra)
    lacking = [requirement for requirement in wanted if not _there(requirement)]
    if not lacking:
        ctx.say(f"  {extra} is there already.")
        return
    command = [*_installer(), *lacking]
    ctx.say(f"  {' '.join(command)}")
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise Stop(
            f"{extra} was not installed: {command[0]} ended with exit code {done.returncode}.",
            where="--with",
            remedy="It says why above; pip's own settings (PIP_INDEX_URL, a proxy) hold for it.",
        )


def requirements_of(extra: str) -> list[str]:
    """As the installed service names them, with versions, those of the extras that it stands on included."""
    told = importlib.metadata.requires(DISTRIBUTION) or []
    extras = sorted({match.group(1) for line in told if (match := _EXTRA.search(line))})
    if extra not in extras:
        there = ", ".join(name for name in extras if name != "dev")
        raise Stop(
            f"The service has no extra {extra!r}.", where="--with", remedy=f"There are {there}.", exit=Exit.USAGE
        )
    found: list[str] = []
    for line in told:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        match = _EXTRA.search(marker)
        if match is None or match.group(1) != extra:
            continue
        below = re.fullmatch(rf"{DISTRIBUTION}\[([\w.,-]+)\]", requirement)
        if below is not None:
            found += [r for name in below.group(1).split(",") for r in requirements_of(name.strip())]
        else:
            rest = re.sub(r"(\s*and\s*)?" + _EXTRA.pattern, "", marker).strip()
            found.append(f"{requirement}; {rest}" if rest else requirement)
    return list(dict.fromkeys(found))


def _there(requirement: str) -> bool:
    """By its name: pip looks at the version where it is asked."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    try:
        importlib.metadata.version(match.group(0) if match else requirement)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _installer() -> Sequence[str]:
    """pip, or uv in an environment that was made without it."""
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        uv = shutil.which("uv")
        if uv is None:
            remedy = f"Give this environment pip ({sys.executable} -m ensurepip), or install uv."
            raise Stop("There is no pip in this environment.", where=sys.prefix, remedy=remedy) from None
        return [uv, "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
