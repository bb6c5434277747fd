"""Characters that no name may hold, in a user's file or given to a resource: databases refuse them, logs and terminals
act on them, or they show a name as another one. What writing needs (joiners of emoji and Indic scripts, marks of
direction) is allowed. The one home of these rules, and of the header that hands a name to a browser."""

from __future__ import annotations

import re
from urllib.parse import quote

# C0, DEL, C1; embeddings, overrides and isolates of direction; halves of surrogate pairs (no text in UTF-8 has those).
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
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


def content_disposition(filename: str) -> str:
    """The `Content-Disposition` that downloads under this name (RFC 6266), safe for any `filename`: no path, no control
    characters, no quote; names outside ASCII go as `filename*` (RFC 8187) beside an ASCII approximation."""
    name = re.sub(r'["\\/:*?<>|\ufffd]+', "_", printable(filename)).strip(" .")[:150] or "download"
    plain = re.sub(r"[^\x20-\x7e]", "_", name)
    header = f'attachment; filename="{plain}"'
    if plain == name and "%" not in name:
        return header
    return f"{header}; filename*=UTF-8''{quote(name, safe='')}"
