"""Whatever docs, pages and remedies tell a reader to type is a command that there is, with options that it has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from anneal_client.cli.exits import Stop
from anneal_client.cli.main import make_parser
from anneal_client.cli.usage import parsed
from app.admin.__main__ import parser as admin_parser

ROOT = Path(__file__).resolve().parents[2]
_DOCS = ("docs/**/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "clients/*/README.md")
_CODE = ("app/**/*.py", "app/web/templates/*.html", "clients/python/**/*.py", "workers/**/*.py")
_COMMAND = r"(?:\.venv/bin/)?anneal(?:-admin)? [a-z][^`\n]*"
# In the text of pages and of the code's own messages: between backticks, or a page's <code>. In code blocks: a line.
_TOLD = re.compile(rf"`({_COMMAND})`|<code>({_COMMAND.replace('`', '<')})</code>|^({_COMMAND})$", re.MULTILINE)
# A page may speak of an option, or of a command, without all that it takes.
_ONLY_A_PART = re.compile("arguments are required|is required|expected one argument")
_MEANT = {"JOB": "job_1", "JOB_ID": "job_1", "ENGINE": "eng_1", "FIRST": "eng_1", "SECOND": "eng_2", "WEBHOOK": "whk_1",
          "DELIVERY": "msg_1", "ID": "job_1", "job_…": "job_1", "eng_…": "eng_1", "URL": "http://127.0.0.1:8000",
          "ENGINE|JOB": "eng_1"}  # fmt: skip


def shown() -> Iterator[tuple[str, str]]:
    """(file, command)."""
    for pattern in (*_DOCS, *_CODE):
        for path in sorted(ROOT.glob(pattern)):
            for groups in _TOLD.findall(path.read_text()):
                yield str(path.relative_to(ROOT)), next(filter(None, groups))


def words(command: str, spec: Path) -> list[str]:
    """As a shell would hand them on, with what stands for something put in."""
    command = re.sub(r"\s#.*|\s[|<>&].*|\s→.*|\s{2,}.*", "", command).replace(" …", "")
    command = re.sub(r"\[[^\]]*\]", "", command)
    found = [_MEANT.get(word, word) for word in shlex.split(command)[1:]]
    return [str(spec) if word in ("FILE", "kept.json") else word for word in found]


def test_every_command_that_is_told_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text("{}")
    wrong, tried = [], 0
    for where, command in shown():
        if re.search(r"[{}%](?!\s|$)", command) or "COMMAND" in command or command.count("anneal") > 1:
            continue  # a template's, or words about commands
        typed = words(command, spec)
        own = command.split()[0].endswith("anneal")
        tried += 1
        try:
            if own:
                parsed(make_parser(), typed)
            else:
                admin_parser().parse_args(typed)
        except Stop as stop:
            if not _ONLY_A_PART.search(stop.what):
                wrong.append(f"{where}: {command}: {stop.what}")
        except SystemExit:
            if not _ONLY_A_PART.search(said := capsys.readouterr().err):
                wrong.append(f"{where}: {command}: {said[-200:]}")
    assert not wrong, "\n".join(wrong)
    assert tried > 80
