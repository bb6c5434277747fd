"""`python -m tests.upgrade.previous_tests [pytest's arguments]`: tests of the release before, as they were, on
databases that the migrations of this one have made.

One function of that release is replaced, in the copy that is run: its `upgrade`, by this release's `app migrate`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.factories.previous_release import REPOSITORY, Tree, check_out, previous_release

# Those that ask the database the most; not those of its own migrations.
QUICK = (
    *("tests/api/test_jobs.py", "tests/api/test_uploads.py", "tests/api/test_models.py", "tests/api/test_engines.py"),
    *("tests/api/test_postgres.py", "tests/api/test_operation.py", "tests/api/test_pages.py"),
    *("tests/integration/test_ledger.py", "tests/integration/test_collector.py", "tests/integration/test_prebuilds.py"),
    *("tests/integration/test_webhooks.py", "tests/integration/test_compatibility.py"),
    *("tests/integration/test_targets.py", "tests/integration/test_kills.py"),
)
_MIGRATES = """

def upgrade(database_url: str) -> None:
    import os, subprocess, sys

    environment = {{**os.environ, "DATABASE_URL": database_url, "PYTHONPATH": {folder!r}}}
    subprocess.run([sys.executable, "-m", "app", "migrate"], cwd={folder!r}, env=environment, check=True)
"""


def run(tree: Tree, arguments: Sequence[str]) -> int:
    with (tree.folder / "app" / "db" / "migrate.py").open("a") as module:
        module.write(_MIGRATES.format(folder=str(REPOSITORY)))
    environment = tree.environment(os.environ)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=tree.folder, env=environment, check=False).returncode


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="anneal-previous-") as folder:
        tree = check_out(Path(folder) / "tree")
        sys.stdout.write(f"Tests of {previous_release().commit[:12]} on the schema of this release\n")
        sys.stdout.flush()
        return run(tree, sys.argv[1:] or ["-v", "-n", "2", "--dist", "loadfile", *QUICK])


if __name__ == "__main__":
    sys.exit(main())
