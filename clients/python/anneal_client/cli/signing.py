"""`anneal login` and `anneal logout`: which service is asked from now on, and with which key, or as whom."""

from __future__ import annotations

import argparse
import getpass
import sys
from typing import Any

from anneal_client.cli import device, logins
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.screen import clean
from anneal_client.cli.service import Service
from anneal_client.errors import Unauthorized


def add(commands: Any) -> None:
    login = commands.add_parser("login", help="keep a service's address and key, after trying them")
    login.add_argument("address", metavar="URL", nargs="?", help="of the service (as --url)")
    login.add_argument("--key-stdin", action="store_true", help="read the key from standard input, ask nobody")
    login.add_argument("--oidc", action="store_true", help="as yourself, at the service's identity provider")
    login.set_defaults(run=run_login)
    logout = commands.add_parser("logout", help="forget a service's key")
    logout.add_argument("address", metavar="URL", nargs="?")
    logout.set_defaults(run=run_logout)


def run_login(ctx: Context, args: argparse.Namespace) -> Exit:
    url = logins.address(args.address or ctx.url)
    ctx.url = url  # whatever fails now is told of this address
    if args.oidc:
        return _as_oneself(ctx, url)
    wanted = _needs_key(url)
    key = _key(args, wanted)
    if wanted or key:
        with Service(logins.Place(url, key, "login", "login")) as service:
            service.check_key()
    path = logins.keep(url, key)
    if ctx.json:
        ctx.emit({"url": url, "key": key is not None, "kept_in": str(path)})
    else:
        what = "with its key" if key else "which wants no key"
        ctx.say(f"  {clean(url)}, {what}, is asked from now on ({clean(path)}).")
    return Exit.OK


def _as_oneself(ctx: Context, url: str) -> Exit:
    tokens = device.sign_in(url, lambda asked: _tell(ctx, asked))
    with Service(logins.Place(url, tokens.access_token, "login", "login")) as service:
        service.check_key()
    path = logins.keep_tokens(url, tokens)
    if ctx.json:
        ctx.emit({"url": url, "key": False, "oidc": True, "renews": bool(tokens.refresh_token), "kept_in": str(path)})
    else:
        lasts = "and is renewed by itself" if tokens.refresh_token else "until the token ends"
        ctx.say(f"  {clean(url)} is asked from now on as yourself, {lasts} ({clean(path)}).")
    return Exit.OK


def _tell(ctx: Context, asked: device.Asked) -> None:
    """On stderr with --json: there has to be a way to say it."""
    where = asked.link or asked.address
    text = f"  Open {clean(where)} and see that it shows the code {clean(asked.code)}."
    if ctx.json or ctx.quiet:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    else:
        ctx.say(text)


def _needs_key(url: str) -> bool:
    with Service(logins.Place(url, None, "login", "none")) as service:
        try:
            service.check_key()
        except Unauthorized:
            return True
    return False


def _key(args: argparse.Namespace, wanted: bool) -> str | None:
    if args.key_stdin:
        key = sys.stdin.readline().strip()
    elif wanted and sys.stdin.isatty():
        key = getpass.getpass("API key: ").strip()
    elif wanted:
        remedy = "Pipe it in: `anneal login URL --key-stdin < FILE`, or set $ANNEAL_API_KEY instead of logging in."
        raise Stop("The service wants a key, and nobody is here to type it.", remedy=remedy, exit=Exit.UNAUTHORIZED)
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        remedy = "A key is one word, as `python -m app create-key` prints it (ank_…)."
        raise Stop("That is no key.", where="API key", remedy=remedy, exit=Exit.UNAUTHORIZED)
    return key


def run_logout(ctx: Context, args: argparse.Namespace) -> Exit:
    url = logins.address(args.address or ctx.url)
    known = logins.forget(url)
    if ctx.json:
        ctx.emit({"url": url, "forgotten": known})
    else:
        ctx.say(f"  {clean(url)} is {'forgotten' if known else 'not known here'}.")
    return Exit.OK
