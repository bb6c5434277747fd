"""The documentation is a site whose links lead somewhere, and which loads nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integrations.docs_site import build
from tests.integrations.environments import REPOSITORY

_LOADED = re.compile(r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+stylesheet[^>]+href="([^"]+)"')


def test_every_page_is_in_the_site_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    build(tmp_path / "site")
    docs = REPOSITORY / "docs"
    for source in docs.rglob("*.md"):
        page = (tmp_path / "site" / source.relative_to(docs)).with_suffix(".html")
        loaded = [url for pair in _LOADED.findall(page.read_text()) for url in pair if url]
        assert loaded
        assert not [url for url in loaded if "//" in url], page.name


@pytest.mark.parametrize("link", ["no-such-page.md", "../no-such-file.py"])
def test_a_link_that_leads_nowhere_fails_it(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "repository"
    tracked = ["git", "ls-files", "-z", "docs", "clients", "app/settings.py", "openapi.json", "mkdocs.yml"]
    listed = subprocess.run(tracked, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, copied / name)
    index = copied / "docs" / "index.md"
    index.write_text(index.read_text() + f"\n[more]({link})\n")
    monkeypatch.setattr("tests.integrations.docs_site.REPOSITORY", copied)
    with pytest.raises(RuntimeError, match="no-such"):
        build(tmp_path / "site")
