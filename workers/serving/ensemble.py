"""A chain of engines as an ensemble of Triton Inference Server: a model of each, and one in which what one gives goes
to the next inside of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.artifacts.ensembles import Step, folder_of
from workers.artifacts import names_in
from workers.candidates import Member
from workers.kernel import Session, TensorSpec, backends
from workers.measure.axes import follows_batch

if TYPE_CHECKING:
    from workers.kernel import Arrays

NOTE = "An ensemble of {names}: each has queue, batches and instances of its own, and can be asked by itself."


@dataclass(frozen=True)
class Link:
    """An engine of the chain as it was tried: `sample` is what it takes of a call of the whole, and `batched` whether
    its tensors follow the batch on their first axes."""

    member: Member
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    sample: Arrays
    batched: bool


@dataclass
class _Tried:
    """The tensors of one call, and of one with the sample twice, as far as the chain has come."""

    once: Arrays
    twice: Arrays = field(default_factory=dict)


def links(members: Sequence[Member], engine: Path, sample: Arrays, twice: Arrays) -> list[Link]:
    """The engines in `engine`, loaded and called in order. `twice`: the sample two times at once; none where the whole
    does not take that."""
    tried, found = _Tried(dict(sample), dict(twice)), list[Link]()
    for member in members:
        session = backends()[member.backend]().load(engine / member.folder, member.runtime)
        try:
            found.append(_link(member, session, tried))
        finally:
            session.close()
    return found


def _link(member: Member, session: Session, tried: _Tried) -> Link:
    taken = {spec.name: tried.once[spec.name] for spec in session.inputs}
    given = session.run(taken)
    doubled: Arrays = {}
    if tried.twice:
        doubled = session.run({spec.name: tried.twice[spec.name] for spec in session.inputs})
    batched = bool(doubled) and follows_batch(session, given, doubled)
    tried.once |= given
    tried.twice |= doubled
    return Link(member, tuple(session.inputs), tuple(session.outputs), taken, batched)


def files_of(member: Member, engine: Path, scripts: Mapping[str, str]) -> dict[str, str]:
    """What the member's `infer.py` lies beside: name there → member of the bundle. `scripts`: as members of the
    bundle."""
    own = {name: f"{member.folder}/{name}" for name in names_in(engine / member.folder)}
    return {**own, "infer.py": scripts[f"{member.folder}/infer.py"]}


def whole(
    name: str, models: Sequence[Mapping[str, Any]], inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The ensemble's folder, and what another model of the server has to know of it (`triton.interface`). `models`:
    what the repository's others tell; a tensor has one name in all of them. `inputs`, `outputs`: of the whole."""
    taken = {t["name"]: t for model in reversed(models) for t in model["input"]}
    given = {t["name"]: t for model in models for t in model["output"]}
    told: dict[str, Any] = {
        "name": name,
        "max_batch_size": min(int(model["max_batch_size"]) for model in models),
        "input": [taken[n] for n in inputs if n in taken],
        "output": [given[n] for n in outputs],
    }
    steps = [
        Step(model, *({t["name"]: t["name"] for t in model[side]} for side in ("input", "output"))) for model in models
    ]
    return folder_of(name, steps, told["input"], told["output"]), told
