"""Characters that no name in a user's file may hold: databases refuse them, and logs and terminals act on them."""

from __future__ import annotations

import re

# C0, DEL, and halves of surrogate pairs (no text in UTF-8 has those).
_FORBIDDEN = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def forbidden_character(name: str) -> str | None:
    """The first forbidden character as "U+0000"; None where there is none."""
    found = _FORBIDDEN.search(name)
    return f"U+{ord(found[0]):04X}" if found else None


def printable(text: str) -> str:
    """`text` with U+FFFD for every forbidden character."""
    return _FORBIDDEN.sub(_REPLACEMENT, text)


def storable(text: str) -> str:
    """`text` with U+FFFD for NUL and lone surrogates, which PostgreSQL refuses in text and JSONB."""
    return _UNSTORABLE.sub(_REPLACEMENT, text)
