"""The parser, and what a command ends with: an exit code, and where something is wrong what, where and the remedy."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import httpx

from anneal_client import __version__
from anneal_client.cli import (
    bench,
    completing,
    deleting,
    doctor,
    engines,
    listing,
    outcome,
    reports,
    serving,
    signing,
    submitting,
    webhooks,
)
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.screen import Screen, clean
from anneal_client.cli.usage import Parser, parsed
from anneal_client.errors import AnnealError

_ORDER = (
    serving,
    signing,
    submitting,
    listing,
    outcome,
    reports,
    engines,
    deleting,
    bench,
    webhooks,
    doctor,
    completing,
)
_EPILOG = """exit codes: 0 done, the promise is kept; 1 refused; 2 wrong usage; 3 nothing is faster; 4 a limit is
missed; 5 the job failed; 6 no answer; 7 no valid key; 8 cancelled; 9 --timeout; 130 Ctrl-C

Address and key: --url and $ANNEAL_API_KEY, $ANNEAL_URL, or what `anneal login` keeps."""

_NO_SERVICE = "Is this the address of an Anneal service? `anneal doctor` looks."


def make_parser() -> Parser:
    shared = Parser(add_help=False)
    told = shared.add_argument_group("everywhere")
    told.add_argument("--url", metavar="URL", default=argparse.SUPPRESS, help="of the service")
    told.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")
    told.add_argument("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="say nothing but errors")
    parser = Parser(
        prog="anneal",
        description="Inference optimization as a service: a model in, a faster engine out, with the proof.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"anneal-client {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in _ORDER:
        module.add(_Commands(commands, shared))
    return parser


class _Commands:
    """Hands each new command what all have."""

    def __init__(self, commands: Any, shared: argparse.ArgumentParser) -> None:
        self._commands = commands
        self._shared = shared

    def add_parser(self, name: str, *, help: str) -> Any:
        text = help[0].upper() + help[1:] + "."
        return self._commands.add_parser(name, help=help, description=text, parents=[self._shared], allow_abbrev=False)

    def below(self, parser: argparse.ArgumentParser, metavar: str) -> _Commands:
        """Commands of a command."""
        return _Commands(parser.add_subparsers(dest="below", metavar=metavar), self._shared)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; answers its exit code."""
    given = sys.argv[1:] if argv is None else [*argv]
    ctx = Context(json="--json" in given)
    try:
        args = parsed(make_parser(), given)
        ctx.url, ctx.quiet = getattr(args, "url", None), getattr(args, "quiet", False)
        ctx.json = getattr(args, "json", False)
        if args.command is None:
            make_parser().print_help()
            return Exit.USAGE
        return int(args.run(ctx, args))
    except Stop as stop:
        return _fail(ctx, stop)
    except AnnealError as error:
        return _fail(ctx, Stop.of(error, ctx.place.url))
    except httpx.HTTPError as error:
        what = f"{ctx.place.url}: {error or type(error).__name__}"
        return _fail(ctx, Stop(what, where=ctx.place.url, remedy=_NO_SERVICE, exit=Exit.UNREACHABLE))
    except KeyError as error:
        return _fail(ctx, Stop(f"The answer has no {error}.", where=ctx.place.url, remedy=_NO_SERVICE))
    except KeyboardInterrupt:
        return _fail(ctx, Stop("Interrupted.", exit=Exit.INTERRUPTED))
    except BrokenPipeError:
        # Whoever read along has seen enough: `anneal jobs --all | head`. Nothing may be written at the end either.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except OSError as error:
        name = str(error.filename) if error.filename else None
        remedy = "Check the path, its permissions and the space that is left."
        return _fail(ctx, Stop(error.strerror or str(error), where=name, remedy=remedy))


def _fail(ctx: Context, stop: Stop) -> int:
    """What, where and the remedy: on stderr for a person, as JSON on stdout for a script."""
    ctx.screen.wipe()
    if ctx.json:
        ctx.emit(stop.to_json())
        return stop.exit
    screen = Screen(sys.stderr)
    screen.line(f"{screen.paint('anneal:', 'bold', 'red')} {clean(stop.what)}")
    for name in ("where", "remedy"):
        value = getattr(stop, name)
        if value:
            screen.line(f"  {name + ':':<8} {clean(value)}")
    if stop.code != stop.exit.name.lower():  # one of the service, or of the client: docs/errors.md has them all
        screen.line(f"  code:    {clean(stop.code)}")
    return stop.exit
