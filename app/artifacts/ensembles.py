"""Two engines as one model of Triton Inference Server: an ensemble, in which what the first one gives goes to the
second one inside of the server (Triton's documents on ensemble models; `model_config.proto`, `ModelEnsembling`).

It is made of the two bundles while it is sent, as their kind `triton` is of one: both models as they were proven,
beside a third folder with the ensemble's configuration.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from app.artifacts.kinds import AGAIN, END, KindMissing, Piece, Rearranged, digest, entry_of, text_pieces
from app.artifacts.protobuf_text import Word, text_format
from app.domain.chain import NotJoined, joints_of, listed, outputs_of

_ALONE = 0  # Triton's `max_batch_size` of a model without a batch axis
_Json = Mapping[str, Any]


class NotChained(Exception):
    """The two engines do not fit each other; the message says where."""


@dataclass(frozen=True)
class Chain:
    """`name`: of the ensemble. `joined`: as it is sent; its pieces are of the two bundles, in their order."""

    name: str
    joined: Rearranged


class Chains:
    """Those that were made lately: their digests take reading all bytes. Threads share it."""

    _MOST = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, Chain] = OrderedDict()

    def of(self, known_by: Hashable, make: Callable[[], Chain]) -> Chain:
        with self._lock:
            if known_by in self._made:
                self._made.move_to_end(known_by)
                return self._made[known_by]
        made = make()
        with self._lock:
            self._made[known_by] = made
            while len(self._made) > self._MOST:
                self._made.popitem(last=False)
        return made


def ensemble(first: BinaryIO, second: BinaryIO, connect: Sequence[str] = ()) -> Chain:
    """Of two stored bundles. `connect`: "output:input" each; none: by equal names, or the only output with the only
    input. Raises `KindMissing` (one of the engines has no `triton` bundle), `NotChained`."""
    told: list[_Json] = []
    pieces: list[Piece] = []
    for source, bundle in enumerate((first, second)):
        entry, own = entry_of(bundle, "triton")
        try:
            told.append(_checked(entry["model"]))
        except (KeyError, TypeError, ValueError) as error:
            raise KindMissing(f"the bundle was made before there were ensembles. {AGAIN}") from error
        pieces += [replace(piece, source=source) for piece in own[:-1]]  # without the end of its .tar
    name, texts = _model(told[0], told[1], connect)
    pieces = [*pieces, *text_pieces(texts), END]
    size = sum(piece.length for piece in pieces)
    return Chain(name, Rearranged(tuple(pieces), digest([first, second], pieces), size))


def _checked(model: Any) -> _Json:
    """What the worker told of a model: a bundle of another version may tell something else. Raises KeyError, TypeError,
    ValueError."""

    def tensors(told: Any) -> list[dict[str, Any]]:
        fields = (("name", str), ("data_type", str), ("dims", lambda dims: [int(dim) for dim in dims]))
        return [{name: kind(tensor[name]) for name, kind in fields} for tensor in told]

    return {
        "name": str(model["name"]),
        "max_batch_size": int(model["max_batch_size"]),
        "input": tensors(model["input"]),
        "output": tensors(model["output"]),
    }


def _model(first: _Json, second: _Json, connect: Sequence[str]) -> tuple[str, dict[str, bytes]]:
    """The ensemble's name, and its folder."""
    if first["name"] == second["name"]:
        raise NotChained(f"Both are called {first['name']!r}, which in one server is one model")
    sizes = int(first["max_batch_size"]), int(second["max_batch_size"])
    if (sizes[0] == _ALONE) != (sizes[1] == _ALONE):
        alone = first if sizes[0] == _ALONE else second
        raise NotChained(f"{alone['name']!r} is served one by one, and the other in batches")
    joints = _joints(first, second, connect)
    for source, target in joints.items():
        _require_fit(_named(first["output"], target), _named(second["input"], source))
    inputs = _inputs(first, second, joints)
    # A tensor of the ensemble has one name inside of it: what goes in and what comes out may share theirs.
    names = {tensor["name"] for tensor in inputs}
    outputs = outputs_of([tensor["name"] for tensor in second["output"]], names)
    between = {name: f"{first['name']}/{name}" for name in joints.values()}
    name = f"{first['name']}-then-{second['name']}"
    taken = {t["name"]: between[joints[t["name"]]] if t["name"] in joints else t["name"] for t in second["input"]}
    steps = [Step(first, {t["name"]: t["name"] for t in first["input"]}, between), Step(second, taken, outputs)]
    given = [{**tensor, "name": outputs[tensor["name"]]} for tensor in second["output"]]
    return name, folder_of(name, steps, inputs, given)


@dataclass(frozen=True)
class Step:
    """One model of an ensemble. `inputs`, `outputs`: the model's tensor → the ensemble's."""

    model: _Json
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def told(self) -> dict[str, Any]:
        def pairs(tensors: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"key": own, "value": name} for own, name in tensors.items()]

        return {
            "model_name": self.model["name"],
            "model_version": -1,
            "input_map": pairs(self.inputs),
            "output_map": pairs(self.outputs),
        }


def folder_of(name: str, steps: Sequence[Step], inputs: Sequence[_Json], outputs: Sequence[_Json]) -> dict[str, bytes]:
    """The folder of an ensemble of these models, which lie beside it. `inputs`, `outputs`: its tensors, as a
    model's."""
    config = {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": min(int(step.model["max_batch_size"]) for step in steps),
        "input": [_tensor(tensor) for tensor in inputs],
        "output": [_tensor(tensor) for tensor in outputs],
        "ensemble_scheduling": {"step": [step.told() for step in steps]},
    }
    names = [str(step.model["name"]) for step in steps]
    ways = "; ".join(f"what {one} gives goes to {other}" for one, other in itertools.pairwise(names))
    head = f"# {_sentence(ways)}; {'both' if len(names) == 2 else 'all'} lie beside this folder."
    texts = {"config.pbtxt": "\n".join([head, *text_format(config)]) + "\n", "1/README.md": f"{head[2:]}\n"}
    return {f"{name}/{path}": text.encode() for path, text in texts.items()}


def _joints(first: _Json, second: _Json, connect: Sequence[str]) -> dict[str, str]:
    """Input of the second → output of the first."""
    outputs, inputs = ([str(t["name"]) for t in tensors] for tensors in (first["output"], second["input"]))
    found: dict[str, str] = {}
    for pair in connect:
        # Names may hold colons.
        cuts = [(pair[:at], pair[at + 1 :]) for at, sign in enumerate(pair) if sign == ":"]
        joint = next(((o, i) for o, i in cuts if o in outputs and i in inputs), None)
        if joint is None:
            raise NotChained(
                f"{pair!r} is no output:input; the first one gives {listed(outputs)}, the second one takes "
                f"{listed(inputs)}"
            )
        if joint[1] in found:
            raise NotChained(f"The input {joint[1]!r} is connected twice")
        found[joint[1]] = joint[0]
    try:
        return joints_of(outputs, inputs, found)
    except NotJoined as error:
        raise NotChained(_sentence(str(error))) from error


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _inputs(first: _Json, second: _Json, joints: Mapping[str, str]) -> list[_Json]:
    """Those of the first, and of the second what nothing goes to. One name is one input of both."""
    found: list[_Json] = [*first["input"]]
    known = {tensor["name"]: tensor for tensor in found}
    for tensor in second["input"]:
        if tensor["name"] in joints:
            continue
        if tensor["name"] in known:
            _require_fit(known[tensor["name"]], tensor)
        else:
            found.append(tensor)
    return found


def _require_fit(given: _Json, taken: _Json) -> None:
    same = given["data_type"] == taken["data_type"] and len(given["dims"]) == len(taken["dims"])
    if not same or any(a != b and -1 not in (a, b) for a, b in zip(given["dims"], taken["dims"], strict=True)):
        raise NotChained(f"{_told(given)} does not fit {_told(taken)}")


def _told(tensor: _Json) -> str:
    return f"{tensor['name']!r} ({str(tensor['data_type']).removeprefix('TYPE_')} {[*tensor['dims']]})"


def _tensor(tensor: _Json) -> dict[str, Any]:
    return {"name": tensor["name"], "data_type": Word(tensor["data_type"]), "dims": [*tensor["dims"]]}


def _named(tensors: Sequence[_Json], name: str) -> _Json:
    return next(tensor for tensor in tensors if tensor["name"] == name)
