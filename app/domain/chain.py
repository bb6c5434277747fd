"""A chain of models that one job optimizes: how they are bound together, and what the whole takes and gives. Pure.

What the first model gives goes to the second one, and so on: a model is bound to the one before it, so that there are
no cycles to refuse. The rules are those of an ensemble of two engines (`app.artifacts.ensembles`), which uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from app.domain.axes import PLACEHOLDER
from app.domain.strict import Name, Strict

MOST_MODELS = 4
Tensor = Mapping[str, Any]  # name, dtype, shape: sizes, symbols, or None where nothing is known
Deploy = Literal["merged", "ensemble"]
_MERGED: Deploy = "merged"


class Link(Strict):
    """A model that the outputs of the one before it go to. `connect`: its input → the output that goes there; null: by
    equal names, or the only output to the only input. Inputs that nothing goes to are inputs of the whole; one of the
    same name is one input of both."""

    model_id: str
    """The uploaded model."""
    connect: dict[Name, Name] | None = Field(default=None, min_length=1, max_length=256)
    """Its inputs, each with the output of the model before that goes there; null: by equal names."""


class Chain(Strict):
    """The models behind `model_id`, which is the first of them. `deploy`: `merged` makes one engine of the whole;
    `ensemble` one of each model, which the bundle for Triton holds as an ensemble: each can be given instances, and be
    asked, by itself. Either way the whole is what is judged and measured."""

    then: list[Link] = Field(min_length=1, max_length=MOST_MODELS - 1)
    """The models that follow, in order."""
    deploy: Deploy = _MERGED
    """`merged`: one engine of the whole; `ensemble`: an engine of each model."""

    @property
    def apart(self) -> bool:
        """Whether each model is to have an engine of its own."""
        return self.deploy != _MERGED


class NotJoined(Exception):
    """Two models do not fit; the message says where. `model`: the place of the second of them in the chain, from 1 on.
    `input`: of it, where it is about one that the job names."""

    def __init__(self, message: str, model: int = 1, tensor: str | None = None) -> None:
        super().__init__(message)
        self.model, self.input = model, tensor


@dataclass(frozen=True)
class Joined:
    """`joints`: of each model behind the first, its input → the output of the one before. `inputs`: of the whole, each
    once; `taken`: of each model, which of these it takes. `outputs`: of the last model, by their names in the whole,
    which differ (`renamed`: own name → that one) where an input has the name. `sizes`: of each model, what its
    symbolic sizes are in the whole; `fixed`: those of the whole for which a later model takes one size only."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    joints: list[dict[str, str]] = field(default_factory=list)
    taken: list[list[str]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    sizes: list[dict[str, int | str]] = field(default_factory=list)
    fixed: dict[str, int] = field(default_factory=dict)

    def sized(self, model: int, shape: Sequence[Any] | None) -> list[Any] | None:
        """A shape of that model, as it is in the whole."""
        return _sized(_sized(shape, self.sizes[model]), self.fixed)


def join(
    parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], connect: Sequence[Mapping[str, str] | None]
) -> Joined:
    """`parts`: inputs and outputs of each model; `connect`: of each but the first (`Link.connect`). Raises
    `NotJoined`."""
    whole: dict[str, dict[str, Any]] = {tensor["name"]: dict(tensor) for tensor in parts[0][0]}
    found = Joined(taken=[[*whole]], sizes=[{}])
    outputs = [dict(tensor) for tensor in parts[0][1]]
    for place, (told, (inputs, own)) in enumerate(zip(connect, parts[1:], strict=True), 1):
        given = {str(tensor["name"]): tensor for tensor in outputs}
        joints = joints_of([*given], [str(tensor["name"]) for tensor in inputs], told, place)
        sizes: dict[str, int | str] = {}
        for tensor in inputs:
            if tensor["name"] in joints:
                _require_fit(given[joints[tensor["name"]]], tensor, sizes, found.fixed, place)
        taken = []
        for tensor in inputs:
            name = str(tensor["name"])
            if name in joints:
                continue
            taken.append(name)
            if name in whole:
                _require_fit(whole[name], tensor, sizes, found.fixed, place)
            else:
                whole[name] = {**tensor, "shape": _sized(tensor["shape"], sizes)}
        outputs = [{**tensor, "shape": _sized(tensor["shape"], sizes)} for tensor in own]
        found.joints.append(joints)
        found.taken.append(taken)
        found.sizes.append(sizes)
    found.inputs.extend({**tensor, "shape": _sized(tensor["shape"], found.fixed)} for tensor in whole.values())
    found.renamed.update(outputs_of([tensor["name"] for tensor in outputs], whole.keys()))
    found.outputs.extend(
        {**tensor, "name": found.renamed[tensor["name"]], "shape": _sized(tensor["shape"], found.fixed)}
        for tensor in outputs
    )
    return found


def joints_of(
    outputs: Sequence[str], inputs: Sequence[str], connect: Mapping[str, str] | None, place: int = 1
) -> dict[str, str]:
    """Input of the second → output of the first. Raises `NotJoined`."""
    if not connect:
        same = {name: name for name in inputs if name in outputs}
        if not same and len(inputs) == len(outputs) == 1:
            return {inputs[0]: outputs[0]}
        if not same:
            raise NotJoined(
                f"no output of the first ({listed(outputs)}) is called as an input of the second ({listed(inputs)})",
                place,
            )
        return same
    for own, given in connect.items():
        if own not in inputs:
            raise NotJoined(f"the second one has no input {own!r}; it has {listed(inputs)}", place, own)
        if given not in outputs:
            raise NotJoined(f"the first one has no output {given!r}; it has {listed(outputs)}", place, own)
    return dict(connect)


def outputs_of(own: Sequence[str], inputs: AbstractSet[str]) -> dict[str, str]:
    """Output of the last → its name in the whole: another one where an input has that."""
    found: dict[str, str] = {}
    for name in own:
        told = name
        while told in inputs or told in found.values() or (told != name and told in own):
            told += "_out"
        found[name] = told
    return found


def _require_fit(given: Tensor, taken: Tensor, sizes: dict[str, int | str], fixed: dict[str, int], place: int) -> None:
    """Types are equal, and so are sizes; what the second one leaves open is what the first one says (`sizes`), and what
    only the first one leaves open is what the second one takes (`fixed`)."""
    name = str(taken["name"])
    if given["dtype"] != taken["dtype"]:
        raise NotJoined(f"{_told(given)} does not fit {_told(taken)}: the types differ", place, name)
    ours, theirs = given["shape"], taken["shape"]
    if ours is None or theirs is None:
        return
    if len(ours) != len(theirs):
        raise NotJoined(
            f"{_told(given)} does not fit {_told(taken)}: one has {len(ours)} axes, the other {len(theirs)}",
            place,
            name,
        )
    for axis, (size, wanted) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(wanted, int):
            known = fixed.setdefault(size, wanted) if isinstance(size, str) and _says(size) else size
            if isinstance(known, int) and known != wanted:
                raise NotJoined(f"{_told(given)} does not fit {_told(taken)} on axis {axis}", place, name)
            continue
        if not _says(size) or not _says(wanted):
            continue
        meant = sizes.setdefault(str(wanted), size)
        if isinstance(meant, int) and isinstance(size, int) and meant != size:
            what = f"{wanted!r} would be {meant} and {size}"
            raise NotJoined(f"{_told(given)} does not fit {_told(taken)} on axis {axis}: {what}", place, name)
        if isinstance(size, int):
            sizes[str(wanted)] = size


def _says(size: Any) -> bool:
    return isinstance(size, int) or (isinstance(size, str) and PLACEHOLDER.fullmatch(size) is None)


def _sized(shape: Sequence[Any] | None, sizes: Mapping[str, int | str]) -> list[Any] | None:
    return None if shape is None else [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape]


def _told(tensor: Tensor) -> str:
    shape = tensor["shape"]
    return f"{tensor['name']!r} ({tensor['dtype']} {'of any shape' if shape is None else [*shape]})"


def listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def models_of(spec: Mapping[str, Any]) -> list[str]:
    """The models behind the first one, of a job with this spec (as JSON)."""
    return [str(link["model_id"]) for link in (spec.get("chain") or {}).get("then") or ()]
