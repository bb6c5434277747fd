"""The release before this one (`migrations/previous_release.toml`), as files that its processes and tests run from.

It runs in this environment, with today's libraries: dependencies of its own that are gone by now would be missed here.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_FILE = REPOSITORY / "migrations" / "previous_release.toml"
_FETCH_S = 60


class NoHistory(RuntimeError):
    """The commit is not in this checkout: a copy without `.git`, or a shallow clone whose origin does not give it."""


@dataclass(frozen=True)
class PreviousRelease:
    """`retired`: columns ("table.column") that it no longer knows."""

    commit: str
    revision: str
    retired: frozenset[str]


@dataclass(frozen=True)
class Tree:
    """Its files, or those of this release."""

    folder: Path

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Python finds the tree's packages before those of this checkout."""
        return {**environment, "PYTHONPATH": f"{self.folder}{os.pathsep}{self.folder / 'clients' / 'python'}"}

    def run(self, environment: Mapping[str, str], *command: str, stdin: str = "") -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(environment),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout.strip()


THIS_RELEASE = Tree(REPOSITORY)


def previous_release() -> PreviousRelease:
    found = tomllib.loads(_FILE.read_text())
    return PreviousRelease(found["commit"], found["revision"], frozenset(found["retired"]))


def check_out(folder: Path) -> Tree:
    """All its files, below `folder`."""
    commit = previous_release().commit
    if not _has(commit):
        if _git("rev-parse", "--is-shallow-repository") == "true":
            _git("fetch", "--quiet", "--depth", "1", "origin", commit)
        if not _has(commit):
            raise NoHistory(f"Commit {commit} of the release before is not here: `git fetch --unshallow`.")
    folder.mkdir(parents=True)
    with subprocess.Popen(["git", "archive", commit], cwd=REPOSITORY, stdout=subprocess.PIPE) as archive:
        subprocess.run(["tar", "-x"], stdin=archive.stdout, cwd=folder, check=True)
    assert archive.returncode == 0
    return Tree(folder)


def _has(commit: str) -> bool:
    return _git("cat-file", "-t", commit) == "commit"


def _git(*arguments: str) -> str | None:
    """What it said, or None where it failed."""
    # Without git, or where it would ask for a password, there is no history either.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=_FETCH_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
