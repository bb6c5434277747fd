"""Which axis of an input carries the batch, read off symbolic shapes alone. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Shape = Sequence[int | str]

BATCH = "batch"
UNBATCHED = "_unbatched"  # ends the symbol of a first axis that is no batch
# What exporters write for a size that they do not know: no name, so nothing is said about two axes that carry it.
PLACEHOLDER = re.compile(r"\?+|\*|-\d+|-|none|null|nan|n/a|unk|unknown|dynamic|dyn|any|undefined", re.IGNORECASE)
_LETTERS = frozenset(("n", "b", "bs", "bsz"))


def batch_symbol(shapes: Sequence[Shape]) -> str | None:
    """The symbol of the batch: the first one that is called so; else, of those on first axes, the one that most inputs
    have."""
    first = [shape[0] for shape in shapes if shape]
    later = [dim for shape in shapes for dim in shape[1:]]
    symbols = [d for d in (*first, *later) if isinstance(d, str) and _names(d)]
    named = next((d for d in symbols if BATCH in d.lower() and d.isidentifier()), None)
    letter = next((d for d in symbols if d.lower() in _LETTERS), None)
    free = dict.fromkeys(d for d in first if isinstance(d, str) and _names(d))
    return named or letter or max(free, key=lambda d: sum(d in shape for shape in shapes), default=None)


def batch_axes(shapes: Mapping[str, Shape]) -> dict[str, int | None]:
    """For each input (name → shape) the axis that follows the batch; None for one that is the same whatever the batch.

    It is the axis that carries the batch's symbol, else the first one where that is free. Where the batch is fixed: the
    first axis that has its size.
    """
    every = list(shapes.values())
    apart = any(isinstance(dim, str) and dim.endswith(UNBATCHED) for shape in every for dim in shape)
    wanted = batch_symbol(every) or (None if apart else _fixed_size(every))
    found: dict[str, int | None] = {}
    for name, shape in shapes.items():
        at = next((axis for axis, dim in enumerate(shape) if dim == wanted), None)
        if at is None and shape and isinstance(shape[0], str) and not shape[0].endswith(UNBATCHED):
            at = 0
        found[name] = at
    return found


def _names(symbol: str) -> bool:
    return bool(symbol) and not symbol.endswith(UNBATCHED) and not PLACEHOLDER.fullmatch(symbol.strip())


def _fixed_size(shapes: Sequence[Shape]) -> int | None:
    """The first axis' size that every input has somewhere ([1, 512] beside a state [2, 1, 128]: 1)."""
    known = [shape for shape in shapes if shape]
    sizes = [shape[0] for shape in known if isinstance(shape[0], int)]
    return next((s for s in sizes if all(s in shape for shape in known)), next(iter(sizes), None))
