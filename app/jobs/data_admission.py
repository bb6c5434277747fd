"""Whether a data set fits a model, by all that their headers tell: every mismatch is refused at submission, with the
line of Python that mends it. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain.axes import PLACEHOLDER, batch_axes, batch_symbol
from app.domain.shapes import ShapeRange
from app.domain.spec import InputOptions
from app.errors import FieldError, invalid_request

LABELS = "labels"
MOST_ERRORS = 50  # a request may name thousands of inputs that are none
_MOST_LINES = 5
_MOST_AXES = 6  # of which all orders are tried
_LABEL_NAMES = frozenset(
    ("label", "y", "target", "targets", "y_true", "gt", "ground_truth", "class", "classes", "y_test", "y_train")
)
_REMEDY = "Name the arrays by the model's inputs, with the samples along the batch axis, in the model's dtypes."

Tensor = Mapping[str, Any]
Size = int | str | None  # None and symbols: not known


@dataclass(frozen=True)
class _Mismatch:
    """`line`: of Python, that mends it; None where it takes more than one."""

    message: str
    line: str | None = None


def check_inputs(options: Mapping[str, InputOptions], inputs: Sequence[Tensor]) -> None:
    """Raise 422 where the job says of an input what the model's header contradicts."""
    by_name = {i["name"]: i for i in inputs}
    errors = []
    for name, option in options.items():
        pointer = f"/inputs/{name}/batch_axis"
        if name not in by_name:
            if inputs:
                errors.append(FieldError(pointer, f"the model has no input {name!r}; it has {sorted(by_name)}"))
            continue
        shape = by_name[name]["shape"]
        if shape is not None and option.batch_axis is not None and option.batch_axis >= len(shape):
            errors.append(FieldError(pointer, f"there is no axis {option.batch_axis}: the model's shape is {shape}"))
    if errors:
        remedy = "Name an axis of the input's shape, which GET /v1/models/{id} tells, or null where it has no batch."
        detail = f"The batch axes do not fit the model: {errors[0].message}."
        raise invalid_request(detail, errors[:MOST_ERRORS], remedy)


def axes_of(inputs: Sequence[Tensor], options: Mapping[str, InputOptions] | None) -> dict[str, int | None]:
    """The batch axis of every input: what the job says, else what the symbols do."""
    told = {name: option.batch_axis for name, option in (options or {}).items()}
    return {**batch_axes({i["name"]: i["shape"] or () for i in inputs}), **told}


def check_dataset(
    pointer: str,
    arrays: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    shapes: Mapping[str, ShapeRange] | None = None,
    *,
    samples: int | None = None,
    options: Mapping[str, InputOptions] | None = None,
) -> None:
    """Raise 422 where a data set's arrays do not fit the model's inputs and outputs by name, dtype or shape, or its
    samples lie outside of the wanted `shapes`. `samples`: of the data set; `options`: what the job says of inputs."""
    if not inputs:
        return
    stored = {a["name"]: _stored(a, samples) for a in arrays}
    dtypes = {a["name"]: a["dtype"] for a in arrays}
    axes = axes_of(inputs, options)
    known = {i["name"] for i in inputs} | {o["name"] for o in outputs} | {LABELS}
    spare = [name for name in stored if name not in known]
    found: list[_Mismatch] = []
    for item in inputs:
        name = item["name"]
        if name not in stored:
            other = next((n for n in spare if dtypes[n] == item["dtype"] and _like(stored[n], item, axes[name])), None)
            spare = [n for n in spare if n != other]
            found.append(_missing(name, other))
            continue
        found += _wrong_type(name, dtypes[name], item["dtype"])
        if item["shape"] is not None:
            symbol = None if name in (options or {}) else (batch_symbol([i["shape"] or () for i in inputs]) or "")
            wrong = _wrong_shape(name, stored[name], item["shape"], axes[name], samples, symbol)
            found += wrong or _outside(name, stored[name], (shapes or {}).get(name), axes[name])
    for item in outputs:
        if item["name"] in stored and item["name"] not in {i["name"] for i in inputs}:
            found += _wrong_reference(item, dtypes[item["name"]], stored[item["name"]])
    found += [_unknown(name, LABELS in stored) for name in spare]
    if not found:
        return
    lines = list(dict.fromkeys(m.line for m in found if m.line is not None))[:_MOST_LINES]
    raise invalid_request(
        f"The data set does not fit the model: {found[0].message}.",
        [
            FieldError(pointer, m.message + (f"; mend it with `{m.line}`" if m.line else ""))
            for m in found[:MOST_ERRORS]
        ],
        f"{_REMEDY} Before numpy.savez: `{'; '.join(lines)}`." if lines else _REMEDY,
    )


def _stored(array: Tensor, samples: int | None) -> list[Size]:
    """The shape of the whole array; the samples are "samples" where their number is not known."""
    if "first_axis" in array and array["first_axis"] is None and not array["shape"]:
        return []
    return [array.get("first_axis", "samples" if samples is None else samples), *array["shape"]]


def _fits(sizes: Sequence[Size], wanted: Sequence[Size]) -> bool:
    return len(sizes) == len(wanted) and all(
        not isinstance(a, int) or not isinstance(b, int) or a == b for a, b in zip(sizes, wanted, strict=True)
    )


def _sample(shape: Sequence[Size], axis: int | None) -> list[Size]:
    return list(shape) if axis is None else [*shape[:axis], *shape[axis + 1 :]]


def _like(stored: Sequence[Size], item: Tensor, axis: int | None) -> bool:
    return item["shape"] is None or _fits(_sample(stored, axis), _sample(item["shape"], axis))


def _code(name: str) -> str:
    """How a line of Python speaks of an array of this name."""
    return name if name.isidentifier() else f"arrays[{name!r}]"


def _missing(name: str, other: str | None) -> _Mismatch:
    if other is None:
        return _Mismatch(f"array {name!r} is missing")
    message = f"array {name!r} is missing, and {other!r} is no input or output of the model but looks like it"
    argument = f"{name}={_code(other)}" if name.isidentifier() else f"**{{{name!r}: {_code(other)}}}"
    return _Mismatch(message, f"numpy.savez('data.npz', {argument}, ...)")


def _wrong_type(name: str, have: str, wanted: str) -> Iterator[_Mismatch]:
    if have != wanted:
        line = f"{_code(name)} = {_code(name)}.astype(numpy.{wanted})"
        yield _Mismatch(f"array {name!r} is {have}, the model takes {wanted}", None if wanted == "bfloat16" else line)


def _wrong_shape(
    name: str, stored: Sequence[Size], shape: Sequence[Size], axis: int | None, samples: int | None, symbol: str | None
) -> list[_Mismatch]:
    """`symbol`: of the batch, where the job does not say where that is. Then the data may stand on another free axis,
    or, where the symbol is another one, be whole in every sample: the worker tries both."""
    if _holds(stored, shape, axis, samples):
        return []
    if symbol is not None:
        others = [a for a, dim in enumerate(shape) if isinstance(dim, str) and a != axis]
        if samples is not None and any(_holds(stored, shape, a, samples, surely=True) for a in others):
            return []
        if _fits(stored, shape) and len(stored) > 1 and (axis is None or shape[axis] != symbol):
            return []
    names = ["?" if isinstance(d, str) and PLACEHOLDER.fullmatch(d) else d for d in shape]
    wanted = list(names)
    if axis is not None and axis < len(wanted):
        wanted[axis] = "samples"
    shown = ["varying" if d is None else d for d in stored]
    if samples is not None and stored and stored[0] == samples:
        shown[0] = "samples"
    message = f"array {name!r} has shape {shown}, the model takes {wanted}"
    if axis is not None and _fits(_sample(stored, axis), _sample(shape, axis)) and len(stored) == len(shape):
        message = f"array {name!r} has {stored[axis]} samples, the data set has {samples}"
    return [_Mismatch(message, _line(name, stored, shape, axis, samples))]


def _holds(
    stored: Sequence[Size], shape: Sequence[Size], axis: int | None, samples: int | None, *, surely: bool = False
) -> bool:
    """Whether an array of that shape holds the samples along `axis` (`surely`: their number is known to be there)."""
    if axis is None:
        return _fits(stored, shape)
    if axis >= len(stored) or not _fits(_sample(stored, axis), _sample(shape, axis)):
        return False
    have = stored[axis]
    return have == samples if surely else samples is None or not isinstance(have, int) or have == samples


def _line(
    name: str, stored: Sequence[Size], shape: Sequence[Size], axis: int | None, samples: int | None
) -> str | None:
    """The line that makes the model's shape of the array's: samples moved, axes in another order, one more or less."""
    code = _code(name)
    if axis is None or not stored:
        return f"{code} = {code}[0]" if axis is None and _fits(stored[1:], shape) else None
    if len(stored) == len(shape):
        at = next((a for a, size in enumerate(stored) if a != axis and samples is not None and size == samples), None)
        if at is not None:
            moved = [s for a, s in enumerate(stored) if a != at]
            if _fits(moved, _sample(shape, axis)):
                return f"{code} = numpy.moveaxis({code}, {at}, {axis})"
        order = _order(stored, shape, axis)
        if order is not None:
            return f"{code} = numpy.transpose({code}, {order})"
    if axis == 0:
        have, wanted = list(stored[1:]), list(shape[1:])
        for at, size in enumerate(wanted):
            if size == 1 and _fits(have, wanted[:at] + wanted[at + 1 :]):
                return f"{code} = numpy.expand_dims({code}, {at + 1})"
        for at, size in enumerate(have):
            if size == 1 and _fits(have[:at] + have[at + 1 :], wanted):
                return f"{code} = numpy.squeeze({code}, {at + 1})"
        sizes = [s for s in have if isinstance(s, int)]
        into = [s for s in wanted if isinstance(s, int)]
        if len(sizes) == len(have) and len(into) == len(wanted) and math.prod(sizes) == math.prod(into):
            return f"{code} = {code}.reshape(-1, {', '.join(map(str, into))})"
    return None


def _order(stored: Sequence[Size], shape: Sequence[Size], axis: int) -> tuple[int, ...] | None:
    """The order of axes, the batch's kept, in which the array fits; the one that moves a block of axes first (channels
    to the front or to the back)."""
    rest = [a for a in range(len(shape)) if a != axis]
    if len(shape) > _MOST_AXES or not any(isinstance(shape[a], int) for a in rest):
        return None
    turned = [rest[i:] + rest[:i] for i in range(len(rest) - 1, 0, -1)]
    for order in itertools.chain(turned, map(list, itertools.permutations(rest))):
        whole = [*order[:axis], axis, *order[axis:]]
        if _fits([stored[a] for a in order], [shape[a] for a in rest]):
            return tuple(whole)
    return None


def _outside(name: str, stored: Sequence[Size], wanted: ShapeRange | None, batch_axis: int | None) -> list[_Mismatch]:
    """The axes of an array that leave the wanted range; that of the samples may have any length."""
    if wanted is None:
        return []
    return [
        _Mismatch(f"array {name!r} has {size} along axis {axis}, outside of the wanted shapes ({low} to {high})")
        for axis, (size, low, high) in enumerate(zip(stored, wanted.min, wanted.max, strict=False))
        if axis != batch_axis and isinstance(size, int) and not low <= size <= high
    ]


def _wrong_reference(output: Tensor, dtype: str, stored: Sequence[Size]) -> Iterator[_Mismatch]:
    """Of an array named by an output: what the answer should be."""
    name, shape = output["name"], output["shape"]
    if _kind(dtype) != _kind(output["dtype"]) and "other" not in (_kind(dtype), _kind(output["dtype"])):
        line = f"{_code(name)} = {_code(name)}.astype(numpy.{output['dtype']})"
        message = (
            f"the reference {name!r} is {dtype}, the model's output is {output['dtype']}; class numbers are `labels`"
        )
        yield _Mismatch(
            message, f"numpy.savez('data.npz', labels={_code(name)}, ...)" if _kind(dtype) == "int" else line
        )
    elif shape and not _fits(stored[1:], shape[1:]):
        wanted, have = ["samples", *shape[1:]], ["samples", *stored[1:]]
        yield _Mismatch(f"the reference {name!r} has shape {have}, the model's output is {wanted}")


def _kind(dtype: str) -> str:
    if dtype.startswith(("float", "bfloat")):
        return "float"
    return "int" if dtype.startswith(("int", "uint")) else dtype if dtype == "bool" else "other"


def _unknown(name: str, labelled: bool) -> _Mismatch:
    message = f"array {name!r} is no input or output of the model"
    if not labelled and name.lower() in _LABEL_NAMES:
        return _Mismatch(
            f"{message}; class numbers and targets are called 'labels'",
            f"numpy.savez('data.npz', labels={_code(name)}, ...)",
        )
    return _Mismatch(message, f"del arrays[{name!r}]")
