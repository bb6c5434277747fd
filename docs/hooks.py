"""What the site does with links to the repository's other files: they are shown as paths, and have to be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


class BrokenLink(Exception):
    """A page names a file that is not in the repository."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave `docs/` become the path of what they mean."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def shown(found: re.Match[str]) -> str:
        words, target, _anchor = found.groups()
        path = (folder / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            raise BrokenLink(f"{page.file.src_uri}: {target} is not there")
        if path.is_relative_to(ROOT / "docs"):
            return found[0]
        name = f"`{path.relative_to(ROOT).as_posix()}`"
        return name if words.strip("`") in path.as_posix() else f"{words} ({name})"

    return _LINK.sub(shown, markdown)
