"""`anneal completions`: what bash, zsh and fish complete, made of the parser, so that it is never behind it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class _Command:
    """`path`: the words before; `options`: (name, help, takes a value, choices)."""

    path: tuple[str, ...]
    below: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str, bool, tuple[str, ...]], ...]
    choices: tuple[str, ...]


def add(commands: Any) -> None:
    parser = commands.add_parser("completions", help="print what a shell completes: bash, zsh, fish")
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(ctx: Context, args: argparse.Namespace) -> Exit:
    from anneal_client.cli.main import make_parser

    made = {"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell]
    ctx.screen.out.write("\n".join(made([*_commands(make_parser(), ())])) + "\n")
    return Exit.OK


def _commands(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[_Command]:
    options, below, choices = [], [], tuple[str, ...]()
    subparsers: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:  # argparse has no other way to ask for them
        if isinstance(action, argparse._SubParsersAction):
            helps = {str(c.dest): str(c.help or "") for c in action._choices_actions}
            below = [(name, helps.get(name, "")) for name in action.choices]
            subparsers = [*action.choices.items()]
        elif action.option_strings:
            values = tuple(map(str, action.choices or ()))
            told = "" if action.help in (None, argparse.SUPPRESS) else str(action.help).replace("%%", "%")
            options += [(name, told, action.nargs != 0, values) for name in action.option_strings]
        elif action.choices:
            choices = tuple(map(str, action.choices))
    yield _Command(path, tuple(below), tuple(options), choices)
    for name, child in subparsers:
        yield from _commands(child, (*path, name))


def _words(command: _Command) -> str:
    return " ".join([*(n for n, _ in command.below), *command.choices, *(o[0] for o in command.options)])


def _bash(commands: Sequence[_Command]) -> Iterator[str]:
    yield '# anneal completions for bash: eval "$(anneal completions bash)"'
    yield "_anneal() {"
    yield '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" path="" word i'
    yield "  for ((i = 1; i < COMP_CWORD; i++)); do"
    yield '    word="${COMP_WORDS[i]}"'
    known = "|".join(" ".join(c.path) for c in commands if c.path)
    yield f'    case "${{path:+$path }}$word" in {_patterns(known)}) path="${{path:+$path }}$word" ;; esac'
    yield "  done"
    yield '  case "$path $prev" in'
    for command in commands:
        for name, _, takes, values in command.options:
            if takes:
                found = f'COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$cur"))' if values else _BASH_FILES
                yield f'    "{" ".join(command.path)} {name}") {found}; return ;;'
    yield "  esac"
    yield '  case "$path" in'
    for command in commands:
        yield f'    "{" ".join(command.path)}") COMPREPLY=($(compgen -W "{_words(command)}" -- "$cur")) ;;'
    yield "  esac"
    yield f'  [[ ${{#COMPREPLY[@]}} -eq 0 && "$cur" != -* ]] && {_BASH_FILES}'
    yield "  return 0"
    yield "}"
    yield "complete -o filenames -F _anneal anneal"


_BASH_FILES = 'COMPREPLY=($(compgen -f -- "$cur"))'


def _patterns(known: str) -> str:
    return "|".join(f'"{path}"' for path in known.split("|"))


def _zsh(commands: Sequence[_Command]) -> Iterator[str]:
    yield "#compdef anneal"
    yield '# anneal completions for zsh: a file _anneal in a folder of $fpath, or eval "$(anneal completions zsh)"'
    yield "_anneal() {"
    yield '  local path_="" word i'
    yield "  for ((i = 2; i < CURRENT; i++)); do"
    yield '    word="${words[i]}"'
    known = "|".join(" ".join(c.path) for c in commands if c.path)
    yield f'    case "${{path_:+$path_ }}$word" in ({_patterns(known)}) path_="${{path_:+$path_ }}$word" ;; esac'
    yield "  done"
    yield '  case "$path_ ${words[CURRENT-1]}" in'
    for command in commands:
        for name, _, takes, values in command.options:
            if takes:
                found = f"compadd -- {' '.join(values)}" if values else "_files"
                yield f'    ("{" ".join(command.path)} {name}") {found}; return ;;'
    yield "  esac"
    yield "  local -a found"
    yield '  case "$path_" in'
    for command in commands:
        described = [*command.below, *((c, "") for c in command.choices), *((o[0], o[1]) for o in command.options)]
        told = " ".join(_quoted(f"{name.replace(':', chr(92) + ':')}:{text}") for name, text in described)
        yield f'    ("{" ".join(command.path)}") found=({told}) ;;'
    yield "  esac"
    yield "  _describe anneal found; _files"
    yield "}"
    yield "if [[ ${funcstack[1]} == _anneal ]]; then _anneal; else compdef _anneal anneal; fi"


def _fish(commands: Sequence[_Command]) -> Iterator[str]:
    yield "# anneal completions for fish: anneal completions fish > ~/.config/fish/completions/anneal.fish"
    top = " ".join(name for name, _ in commands[0].below)
    for command in commands:
        if not command.path:
            seen = f"not __fish_seen_subcommand_from {top}"
        else:
            seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.path)
        for name, text in (*command.below, *((c, "") for c in command.choices)):
            yield f"complete -c anneal -n {_quoted(seen)} -a {_quoted(name)} -d {_quoted(text)}"
        for name, text, takes, values in command.options:
            flag = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            value = (f" -x -a {_quoted(' '.join(values))}" if values else " -r") if takes else ""
            yield f"complete -c anneal -n {_quoted(seen)} {flag} -d {_quoted(text)}{value}"


def _quoted(text: str) -> str:
    """For zsh and fish alike; an apostrophe is another character then."""
    return "'" + text.replace("\\", "").replace("'", "’").replace("\n", " ") + "'"
