"""What a wrong command or option is told: what is wrong, where, and what may have been meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import NoReturn

from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.screen import clean

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the help is."""

    def error(self, message: str) -> NoReturn:
        choice = _CHOICE.search(message)
        meant = _meant(choice[1], re.findall(r"[\w.-]+", choice[2])) if choice else ""
        raise _wrong(clean(message) + meant, self.prog)


def parsed(parser: Parser, given: Sequence[str]) -> argparse.Namespace:
    """The arguments; `Stop` for what is none, with the one of its command that may have been meant."""
    found, rest = parser.parse_known_args(given)
    if not rest:
        return found
    path, options = parser.prog, [*parser._option_string_actions]
    for name, below in _commands(parser, found):
        path, options = f"{path} {name}", [*below._option_string_actions]
    told = clean(" ".join(rest))
    wrong = rest[0].partition("=")[0]
    if wrong.startswith("-"):
        raise _wrong(f"There is no option {told}{_meant(wrong, options)}", path)
    raise _wrong(f"It takes no further {told}.", path)


def _commands(
    parser: argparse.ArgumentParser, found: argparse.Namespace
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The command that was given, and the one below it."""
    for action in parser._actions:  # argparse has no other way to ask for them
        if isinstance(action, argparse._SubParsersAction):
            name = getattr(found, str(action.dest), None)
            if name is not None:
                yield name, action.choices[name]
                yield from _commands(action.choices[name], found)


def _meant(given: str, there: Sequence[str]) -> str:
    close = get_close_matches(given.lower(), there, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _wrong(what: str, where: str) -> Stop:
    return Stop(what, where=where, remedy=f"`{where} --help` tells what there is.", exit=Exit.USAGE)
