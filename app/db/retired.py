"""Columns that this release no longer knows and the database still has, for processes of the release before.

The next release drops them: `migrations/previous_release.toml` names them once this one is the previous
(docs/upgrades.md). Until then each is nullable or has a server default, so that rows are written without it.
"""

from __future__ import annotations

from typing import Final

# Table and column.
RETIRED: Final[frozenset[tuple[str, str]]] = frozenset(
    {
        ("jobs", "dispatched_at"),  # since 0019: the broker's messages only wake
        ("jobs", "dispatches"),
    }
)
