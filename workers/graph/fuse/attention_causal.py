"""Whether a mask says nothing but that a query sees the keys up to itself, whatever the length.

A window over the last keys looks causal as long as the sequence fits in. So a mask that is computed from the length is
computed for several lengths, one of them longer than every number in its computation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workers.graph.fuse.attention_dims import same
from workers.graph.fuse.attention_operands import Core, Operand, Term
from workers.graph.fuse.attention_view import View

_MASKED = -9_000.0
_LENGTHS = (1, 6, 37)
_LONGEST = 2_048  # that a mask is computed for
_MAX_ELEMENTS = 1 << 24
_ENDLESS = 1 << 20  # numbers from here on stand for "to the end"


def is_causal(view: View, core: Core) -> bool:
    """Proven, or False."""
    if not core.terms or core.causal:
        return False
    queries, keys = _length(view, core.query), _length(view, core.key)
    if not same(queries, keys):
        return False
    if isinstance(queries, int):
        return _is_triangle(view, core.terms, queries, "")
    found = [view.numbers_in(term.name) for term in core.terms]
    numbers = [abs(n) for numbers, _ in found for n in numbers if abs(n) < _ENDLESS]
    longest = max(numbers, default=0) + 1
    tables = [size for _, sizes in found for size in sizes]
    if tables:  # a triangle that is cut to the length; beyond it there is none
        longest = min(tables)
        if _total(view, core.terms, longest + 1, queries) is not None:
            return False
    if longest > _LONGEST:
        return False
    lengths = [n for n in _LENGTHS if not tables or n < longest]
    return all(_is_triangle(view, core.terms, length, queries) for length in (*lengths, longest))


def _length(view: View, operand: Operand) -> int | str:
    return view.known(operand.source)[operand.order[-2]]


def _is_triangle(view: View, terms: tuple[Term, ...], length: int, symbol: int | str) -> bool:
    """Whether the terms add nothing on and below the diagonal, and mask everything above it."""
    total = _total(view, terms, length, symbol)
    if total is None:
        return False
    seen = np.tril(np.ones((length, length), bool))
    return bool((total[..., seen] == 0).all() and (total[..., ~seen] <= _MASKED).all())


def _total(view: View, terms: tuple[Term, ...], length: int, symbol: int | str) -> Any:
    """What the terms add to the scores at this length, [..., length, length]; None where they depend on anything else,
    or cannot be computed for it."""
    total: Any = np.zeros((1, 1))
    for term in terms:
        value = view.evaluate(term.name, length, 2, symbol)
        if value is None or value.ndim > 4 or value.size > _MAX_ELEMENTS:
            return None
        if term.keep is not None:
            value = np.where(value.astype(bool) == term.keep, 0.0, -np.inf)
        else:
            value = value.astype(np.float64) * term.factor
        try:
            total = total + value
        except ValueError:
            return None
    return total if total.shape[-2:] == (length, length) else None
