"""Optimization profiles: which shapes a plan is made for. Pure.

TensorRT takes shapes between min and max of a profile and is fastest at opt; a plan may hold several profiles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.backends.tensorrt.options import BuildOptions
from workers.kernel import TensorSpec

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # min, opt, max
Profile = dict[str, Range]
Triple = tuple[int, int, int]

# Validation runs up to 16 samples at once, whatever is measured.
LEAST_MAX_BATCH = 16
MAX_DERIVED = 3
_DEFAULT_BATCHES = (1, 8)
LONGEST = 512
# Where nothing is known of an axis; they hold what `workers.measure.synthetic` feeds.
_SEQUENCE: Triple = (1, 128, 512)
_IMAGE: Triple = (32, 224, 512)
_CHANNELS: Triple = (3, 3, 3)
_OTHER: Triple = (1, 32, 512)
_SHORTEST = 8
_DIFFER = re.compile(r"(\d+) != (\d+)")


def profiles_for(inputs: Sequence[TensorSpec], options: BuildOptions, longest: int = LONGEST) -> list[Profile]:
    """The profiles to build with; none for a model whose shapes are all fixed. Raises StageFailure(`invalid_profile`).

    Shapes that the job gives are taken as they are, the axes of other inputs follow by their symbolic names. Without
    any, one profile is derived for each batch size that is measured (3 at most), so that each is tuned for. `longest`:
    the largest size of an axis of which nothing is known.
    """
    given: list[Mapping[str, Any]] = list(options.profiles or ([options.shapes] if options.shapes else []))
    if options.profiles and options.shapes:
        raise _invalid("give either shapes or profiles, not both")
    for i, shapes in enumerate(given):
        _check_names(inputs, shapes, i)
    _check_against_each_other(given)
    made = [_profile(inputs, shapes, _given_batch(inputs, shapes), longest) for shapes in given]
    if not any(isinstance(d, str) for spec in inputs for d in spec.shape):
        return []
    return made or [
        _profile(inputs, {}, triple, longest) for triple in _batch_triples(options.batch_sizes or _DEFAULT_BATCHES)
    ]


def shorter(longest: int, said: str) -> int | None:
    """The next `longest` to try where the builder refuses what was derived, since the graph takes no axis that long (a
    table of positions has 64 rows, say): the size that it names, else the half. None where it makes no sense to go on.
    """
    named = [min(int(a), int(b)) for a, b in _DIFFER.findall(said)]
    found = max((n for n in named if _SHORTEST <= n < longest), default=longest // 2)
    return found if found >= _SHORTEST else None


def best_profile(profiles: Sequence[Mapping[str, Range]], shapes: Mapping[str, Shape]) -> int | None:
    """The profile that holds these shapes and whose opt is nearest; None where none holds them."""
    best, distance = None, 0.0
    for i, profile in enumerate(profiles):
        if not all(fits(profile[name], shape) for name, shape in shapes.items() if name in profile):
            continue
        away = sum(_distance(profile[name][1], shape) for name, shape in shapes.items() if name in profile)
        if best is None or away < distance:
            best, distance = i, away
    return best


def fits(allowed: Range, shape: Shape) -> bool:
    low, _, high = allowed
    return len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))


def to_json(profiles: Sequence[Profile]) -> list[dict[str, dict[str, list[int]]]]:
    return [
        {name: {k: list(s) for k, s in zip(("min", "opt", "max"), found, strict=True)} for name, found in p.items()}
        for p in profiles
    ]


def outside_profiles(name: str, shape: Shape, profiles: Sequence[Mapping[str, Range]]) -> StageFailure:
    allowed = "; ".join(f"{list(p[name][0])} to {list(p[name][2])}" for p in profiles if name in p)
    return StageFailure(
        "shape_outside_profiles",
        f"Input {name!r} has shape {list(shape)}; the engine was built for {allowed or 'its fixed shape'}.",
        FailureKind.MODEL,
        tensor=name,
        remedy="Give `shapes` in the job that hold every shape the engine shall run with.",
    )


def _distance(opt: Shape, shape: Shape) -> float:
    return float(sum(max(a, b) / max(1, min(a, b)) - 1 for a, b in zip(opt, shape, strict=True)))


def _batch_triples(sizes: Sequence[int]) -> list[Triple]:
    distinct = sorted(set(sizes))
    if len(distinct) > MAX_DERIVED:
        distinct = [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
    top = max(LEAST_MAX_BATCH, distinct[-1])
    # Only the last profile reaches above its optimum: the others stay tight, which gives TensorRT more freedom.
    return [(1, size, top if size == distinct[-1] else size) for size in distinct]


def _check_names(inputs: Sequence[TensorSpec], shapes: Mapping[str, Any], index: int) -> None:
    by_name = {spec.name: spec for spec in inputs}
    symbols: dict[str, tuple[str, Triple]] = {}
    for name, given in shapes.items():
        spec = by_name.get(name)
        if spec is None:
            raise _invalid(
                f"profile {index} names {name!r}, which is no input; the inputs are {', '.join(by_name)}", name
            )
        low, opt, high = _range(given, name, index)
        if len(opt) != len(spec.shape):
            raise _invalid(
                f"profile {index} gives {name!r} {len(opt)} dimensions, the model has {len(spec.shape)}", name
            )
        for axis, dim in enumerate(spec.shape):
            triple = (low[axis], opt[axis], high[axis])
            if not 1 <= triple[0] <= triple[1] <= triple[2]:
                raise _invalid(f"axis {axis} of {name!r} needs 1 ≤ min ≤ opt ≤ max, got {list(triple)}", name)
            if isinstance(dim, int):
                if set(triple) != {dim}:
                    raise _invalid(
                        f"axis {axis} of {name!r} is {dim} in the model, the profile says {list(triple)}", name
                    )
                continue
            other, before = symbols.setdefault(dim, (name, triple))
            if before != triple:
                raise _invalid(
                    f"{dim!r} is one size in the model; the profile says {list(before)} for {other!r} and "
                    f"{list(triple)} for {name!r}",
                    name,
                )


def _check_against_each_other(given: Sequence[Mapping[str, Any]]) -> None:
    for i, shapes in enumerate(given):
        if set(shapes) != set(given[0]):
            raise _invalid(f"profile {i} names other inputs than profile 0")
        for j in range(i):
            if all(_range(shapes[n], n, i) == _range(given[j][n], n, j) for n in shapes):
                raise _invalid(f"profiles {j} and {i} are the same")


def _range(given: Any, name: str, index: int) -> Range:
    try:
        low, opt, high = (tuple(int(d) for d in given[k]) for k in ("min", "opt", "max"))
    except (KeyError, TypeError, ValueError):
        raise _invalid(f"profile {index} needs min, opt and max (lists of integers) for {name!r}", name) from None
    if not len(low) == len(opt) == len(high):
        raise _invalid(f"min, opt and max of {name!r} have different numbers of dimensions", name)
    return low, opt, high


def _given_batch(inputs: Sequence[TensorSpec], shapes: Mapping[str, Any]) -> Triple:
    """The range of the batch axis: of the first given input whose first axis is free."""
    for spec in inputs:
        if spec.name in shapes and spec.shape and isinstance(spec.shape[0], str):
            low, opt, high = _range(shapes[spec.name], spec.name, 0)
            return low[0], opt[0], high[0]
    return 1, 1, LEAST_MAX_BATCH


def _profile(inputs: Sequence[TensorSpec], shapes: Mapping[str, Any], batch: Triple, longest: int) -> Profile:
    symbols: dict[str, Triple] = {}
    for spec in inputs:
        if spec.name in shapes:
            for dim, triple in zip(spec.shape, zip(*_range(shapes[spec.name], spec.name, 0), strict=True), strict=True):
                if isinstance(dim, str):
                    symbols[dim] = (triple[0], triple[1], triple[2])
    profile: Profile = {}
    for spec in inputs:
        if not any(isinstance(d, str) for d in spec.shape):
            continue
        triples = [_triple(spec, axis, symbols, batch, longest) for axis in range(len(spec.shape))]
        low, opt, high = (tuple(t[k] for t in triples) for k in range(3))
        profile[spec.name] = (low, opt, high)
    return profile


def _triple(spec: TensorSpec, axis: int, symbols: dict[str, Triple], batch: Triple, longest: int) -> Triple:
    dim = spec.shape[axis]
    if isinstance(dim, int):
        return dim, dim, dim
    image = len(spec.shape) == 4 and spec.dtype.startswith(("float", "uint8", "bfloat"))
    if axis == 0:
        default = batch
    elif image:
        default = _CHANNELS if axis == 1 else _IMAGE
    elif axis == 1 and len(spec.shape) in (2, 3):
        default = _SEQUENCE
    else:
        default = _OTHER
    if axis != 0:
        low, opt, high = default
        default = (min(low, longest), min(opt, longest), min(high, longest))
    return symbols.setdefault(dim, default)


def _invalid(why: str, tensor: str | None = None) -> StageFailure:
    return StageFailure(
        "invalid_profile",
        f"The shapes do not fit: {why}.",
        FailureKind.REQUEST,
        tensor=tensor,
        remedy="Give every dynamic input min, opt and max that agree with the model and with each other.",
    )
