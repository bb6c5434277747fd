"""What memory holds side by side. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from workers.search.limits import LOADED_FACTOR


def groups_that_fit(
    sizes: Mapping[str, int], memory_bytes: float, original_bytes: int, *, baselines: int
) -> tuple[list[list[str]], list[str]]:
    """All engines of a timing are kept loaded side by side, the original `baselines` times: as many at once as memory
    holds. `sizes`: of the engines' files, by id. Answers the groups, and those that do not fit even alone."""
    room = memory_bytes - baselines * original_bytes * LOADED_FACTOR
    groups: list[list[str]] = []
    too_large: list[str] = []
    left = 0.0
    for engine, size_bytes in sizes.items():
        size = size_bytes * LOADED_FACTOR
        if size > room:
            too_large.append(engine)
            continue
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1].append(engine)
        left -= size
    return groups, too_large
