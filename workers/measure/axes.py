"""Which axis of each input is the batch, read off the symbolic shapes alone. Pure.

The export stage writes what it was told or found out into the symbols (`name_axes`), so that every stage and backend
that knows an input's shape knows its batch axis.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from app.domain import axes
from app.domain.axes import BATCH, UNBATCHED
from workers.kernel import Session, TensorSpec

if TYPE_CHECKING:
    from workers.kernel import Arrays


def batch_axes(inputs: Sequence[TensorSpec]) -> dict[str, int | None]:
    """For each input the axis that follows the batch; None for one that is the same whatever the batch."""
    return axes.batch_axes({spec.name: spec.shape for spec in inputs})


def follows_batch(session: Session, expected: Arrays, twice: Arrays) -> bool:
    """Whether the first axis of every input and output is the batch: `twice` came out for two samples where `expected`
    did for one."""
    known = batch_axes(session.inputs)
    free = all(known[spec.name] == 0 and isinstance(spec.shape[0], str) for spec in session.inputs)
    return free and all(
        array.shape and name in twice and twice[name].shape == (2 * array.shape[0], *array.shape[1:])
        for name, array in expected.items()
    )


def fixed_batch(inputs: Sequence[TensorSpec]) -> int | None:
    """The one batch size that the model takes, or None where a batch axis is free or there is none."""
    known = batch_axes(inputs)
    sizes = [spec.shape[axis] for spec in inputs if (axis := known[spec.name]) is not None]
    if not sizes or any(not isinstance(dim, int) or dim <= 0 for dim in sizes):
        return None
    assert isinstance(sizes[0], int)
    return sizes[0]


def with_axes(inputs: Sequence[TensorSpec], wanted: Mapping[str, int | None]) -> list[TensorSpec]:
    """The inputs with symbols that make `batch_axes` answer as `wanted` says, for those that it names."""
    symbol = axes.batch_symbol([s.shape for s in inputs if s.name not in wanted])
    batch = symbol if symbol is not None and BATCH in symbol.lower() else BATCH
    found = []
    for spec in inputs:
        shape = list(spec.shape)
        axis = wanted.get(spec.name, -1)
        for at, dim in enumerate(spec.shape):
            if spec.name not in wanted or not isinstance(dim, str):
                continue
            if at == axis:
                shape[at] = batch
            elif dim == batch or axis is None:
                shape[at] = f"{dim}{UNBATCHED}"
        found.append(replace(spec, shape=tuple(shape)))
    return found


def axes_to_try(inputs: Sequence[TensorSpec]) -> list[dict[str, int | None]]:
    """Where else the batch may stand, the likelier first, for a model that does not run as its symbols read: behind a
    fixed first axis (recurrent states [layers, batch, size]), or behind the sequence."""
    known = batch_axes(inputs)
    behind: dict[str, int | None] = {}
    second: dict[str, int | None] = {}
    for spec in inputs:
        free = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str)]
        if free and known[spec.name] is None:
            behind[spec.name] = free[0]
        elif free[:2] == [0, 1] and known[spec.name] == 0 and len(spec.shape) > 2:
            second[spec.name] = 1
    return [h for h in (behind, second, {**behind, **second} if behind and second else {}) if h]


def told_by_sizes(inputs: Sequence[TensorSpec], sizes: Mapping[str, Sequence[int]]) -> dict[str, int | None]:
    """What the shapes of a data set's arrays tell that the symbols do not: the batch is on the axis that has as many
    elements as there are samples; an array that has no such axis is whole in every sample."""
    known = batch_axes(inputs)
    counts = Counter(
        sizes[s.name][a] for s in inputs if (a := known[s.name]) is not None and len(sizes[s.name]) == len(s.shape)
    )
    if not counts:
        return {}
    samples = counts.most_common(1)[0][0]
    told: dict[str, int | None] = {}
    for spec in inputs:
        axis, have = known[spec.name], sizes[spec.name]
        if len(have) != len(spec.shape) or (axis is not None and have[axis] == samples):
            continue
        free = (a for a, dim in enumerate(spec.shape) if isinstance(dim, str) and have[a] == samples)
        found = next(free, None)
        if found != axis:
            told[spec.name] = found
    return told


def sample_shape(spec: TensorSpec, axis: int | None) -> tuple[int | str, ...]:
    """The shape of one sample: without the batch axis; the whole shape where there is none."""
    return spec.shape if axis is None else spec.shape[:axis] + spec.shape[axis + 1 :]


def computed(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a dimension like `past_length + 1`; None where it is no sum or product of known names."""
    try:
        return _value(ast.parse(expression, mode="eval").body, sizes)
    except (SyntaxError, ValueError, KeyError, RecursionError, ZeroDivisionError):
        return None


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    raise ValueError(ast.dump(node)[:80])
