"""The Open Inference Protocol v2 over HTTP: bytes to arrays and back, with Triton's binary tensor extension. Pure.

Of the protocol: https://github.com/kserve/open-inference-protocol, and Triton's `extension_binary_data.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import orjson
except ImportError:  # it is several times as fast where large tensors come as JSON
    orjson = None  # type: ignore[assignment]

if __package__:
    from .rows import Array, Tensor, dtype_of, name_of
    from .serving_settings import InvalidRequest
else:  # beside this file, in a bundle
    from rows import Array, Tensor, dtype_of, name_of  # type: ignore[import-not-found,no-redef]
    from serving_settings import InvalidRequest  # type: ignore[import-not-found,no-redef]

DATATYPES = {
    "bool": "BOOL",
    **{f"{u}int{bits}": f"{u.upper()}INT{bits}" for u in ("u", "") for bits in (8, 16, 32, 64)},
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
}
_NUMPY = {datatype: name for name, datatype in DATATYPES.items()}
_MOST_AXES = 64
_SHORT = 4096  # bytes of a head that is kept
_KEPT = 256  # heads, of requests and of answers


@dataclass(frozen=True)
class Asked:
    """`outputs`: those that are wanted and whether as binary, None for all; `binary`: of those that say nothing.
    `timeout_s`: the request's own, where it has one."""

    feeds: dict[str, Array]
    outputs: dict[str, bool | None] | None
    binary: bool
    id: str | None
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class _Head:
    """What the JSON before binary tensors says, which requests of one client mostly repeat byte for byte: `places` of
    the arrays (name, type, shape, numbers, where behind the head), and how many bytes they have together."""

    places: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int, int], ...]
    length: int
    outputs: dict[str, bool | None] | None
    binary: bool
    timeout_s: float | None

    @classmethod
    def of(cls, asked: Asked) -> _Head:
        places, at = [], 0
        for name, array in asked.feeds.items():
            places.append((name, array.dtype, array.shape, array.size, at))
            at += array.nbytes
        return cls(tuple(places), at, asked.outputs, asked.binary, asked.timeout_s)

    def read(self, body: bytes | memoryview, start: int) -> Asked:
        feeds = {
            name: np.frombuffer(body, dtype, size, start + at).reshape(shape)
            for name, dtype, shape, size, at in self.places
        }
        return Asked(feeds, self.outputs, self.binary, None, self.timeout_s)


_heads: dict[bytes, _Head] = {}
_answers: dict[tuple[Any, ...], bytes] = {}


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value


def wrong(detail: str) -> InvalidRequest:
    """Of a request that the protocol does not allow."""
    return InvalidRequest("invalid_request", detail)


def decode(body: bytes | memoryview, header_length: int | None) -> Asked:
    """`header_length`: what `Inference-Header-Content-Length` says, where binary tensors follow the JSON. Arrays of
    binary tensors lie in `body`. Raises `InvalidRequest`."""
    if header_length is not None and not 0 <= header_length <= len(body):
        raise wrong(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
    key = bytes(body[:header_length]) if header_length is not None and header_length <= _SHORT else None
    if key is not None and (known := _heads.get(key)) is not None and len(key) + known.length == len(body):
        return known.read(body, len(key))
    asked, all_binary = _decoded(body, header_length)
    if key is not None and all_binary and asked.id is None:
        _keep(_heads, key, _Head.of(asked))
    return asked


def _decoded(body: bytes | memoryview, header_length: int | None) -> tuple[Asked, bool]:
    """And whether all its tensors are binary. Raises `InvalidRequest`."""
    try:
        head = _parsed(body if header_length is None else body[:header_length])
    except (ValueError, RecursionError) as error:
        raise wrong(f"the request is no JSON: {error}") from None
    if not isinstance(head, dict) or not isinstance(head.get("inputs"), list):
        raise wrong("the request is to be an object with a list `inputs`")
    at = start = len(body) if header_length is None else header_length
    feeds: dict[str, Array] = {}
    for told in head["inputs"]:
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            raise wrong("an input is to be an object with a name, a shape and a datatype")
        if told["name"] in feeds:
            raise wrong(f"input {told['name']} is given twice")
        feeds[told["name"]], at = tensor(told, body, at)
    if at != len(body):
        raise wrong(f"{len(body) - at} bytes follow the last binary tensor")
    parameters = _object(head, "parameters")
    name = head.get("id")
    asked = Asked(
        feeds,
        outputs_of(head),
        parameters.get("binary_data_output") is True,
        None if name is None else str(name),
        timeout(parameters),
    )
    return asked, at - start == sum(array.nbytes for array in feeds.values())


def _parsed(text: bytes | memoryview) -> Any:
    """Raises ValueError, RecursionError."""
    if orjson is not None:
        try:
            return orjson.loads(text)
        except ValueError:
            pass  # NaN and infinities, which JSON has not and Python's own reads; else that says what is wrong
    return json.loads(bytes(text))


def _text(told: Mapping[str, Any], *, finite: bool) -> bytes:
    """`finite`: no number in it is NaN or infinite."""
    return orjson.dumps(told) if orjson is not None and finite else json.dumps(told).encode()


def tensor(told: Mapping[str, Any], body: bytes | memoryview, at: int) -> tuple[Array, int]:
    """An input's array, and where in the body the next binary one begins. Raises `InvalidRequest`."""
    name, shape, datatype = told["name"], told.get("shape"), told.get("datatype")
    if datatype not in _NUMPY:
        raise wrong(f"input {name} has the datatype {datatype!r}: one of {', '.join(_NUMPY)}")
    known = isinstance(shape, list) and len(shape) <= _MOST_AXES
    if not known or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):  # type: ignore[union-attr]
        raise wrong(f"input {name} has the shape {shape!r}: a list of whole numbers")
    assert isinstance(shape, list)
    dtype, size = dtype_of(_NUMPY[datatype]), math.prod(shape)
    parameters = _object(told, "parameters")
    if "shared_memory_region" in parameters:
        raise wrong(f"input {name} lies in shared memory, which this server has none of")
    length = parameters.get("binary_data_size")
    if length is None:
        return _from_json(name, told.get("data"), shape, dtype), at
    if type(length) is not int or length != size * dtype.itemsize:
        raise wrong(f"input {name} has {length!r} bytes; {shape} of {datatype} are {size * dtype.itemsize}")
    if at + length > len(body):
        raise wrong(f"input {name} ends after the body")
    return np.frombuffer(body, dtype, size, at).reshape(shape), at + length


def _from_json(name: str, data: Any, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    if not isinstance(data, list):
        raise wrong(f"input {name} has neither `data` nor `binary_data_size`")
    try:
        array = np.array(data)
        if array.size and array.dtype.kind not in ("b" if dtype.kind == "b" else "iuf" if dtype.kind in "fV" else "iu"):
            raise wrong(f"input {name} holds {array.dtype} where {dtype} is wanted")
        if dtype.kind in "iu" and array.size:
            limits = np.iinfo(dtype)
            if int(array.min()) < limits.min or int(array.max()) > limits.max:
                raise wrong(f"input {name} holds numbers that {dtype} does not")
        found: Array = array.astype(dtype).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise wrong(f"the data of input {name} do not fill {list(shape)} of {dtype}: {error}") from None
    return found


def outputs_of(head: Mapping[str, Any]) -> dict[str, bool | None] | None:
    asked = head.get("outputs")
    if not asked:
        return None
    if not isinstance(asked, list) or not all(isinstance(o, dict) and isinstance(o.get("name"), str) for o in asked):
        raise wrong("`outputs` is to be a list of objects with a name")
    found: dict[str, bool | None] = {}
    for output in asked:
        parameters = _object(output, "parameters")
        for unknown in ("classification", "shared_memory_region"):
            if parameters.get(unknown):
                raise wrong(f"output {output['name']} asks for {unknown}, which this server does not offer")
        binary = parameters.get("binary_data")
        found[output["name"]] = binary if isinstance(binary, bool) else None
    return found


def timeout(parameters: Mapping[str, Any]) -> float | None:
    """Seconds; the parameter is in microseconds, as Triton's."""
    value = parameters.get("timeout")
    if value is None or value == 0:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise wrong(f"timeout is {value!r}: microseconds, more than 0")
    return float(value) / 1e6


def _object(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name) or {}
    if not isinstance(found, dict):
        raise wrong(f"`{name}` is to be an object")
    return found


def check_outputs(asked: Asked, known: Sequence[str]) -> None:
    """Raises `InvalidRequest` where an output is wanted that the model has not."""
    for name in asked.outputs or ():
        if name not in known:
            raise wrong(f"there is no output {name}; there are {', '.join(known)}")


def datatype_of(name: str, array: Array) -> str:
    """Of an output. Raises `InvalidRequest`."""
    found = DATATYPES.get(name_of(array.dtype))
    if found is None:
        raise wrong(f"output {name} is of type {array.dtype}, which the protocol has not")
    return found


def encode(model: str, asked: Asked, outputs: Mapping[str, Array]) -> tuple[list[bytes | memoryview], int | None]:
    """The pieces of the body, and the length of its JSON where binary tensors follow: those are the memory of `outputs`
    itself, which is not to change any more. Raises `InvalidRequest`."""
    if asked.outputs is None and asked.binary and asked.id is None:
        return _all_binary(model, outputs)
    check_outputs(asked, list(outputs))
    told: list[dict[str, Any]] = []
    tail: list[bytes | memoryview] = []
    finite = True
    for name in outputs if asked.outputs is None else asked.outputs:
        array = outputs[name]
        entry = _entry(name, array)
        wanted = None if asked.outputs is None else asked.outputs[name]
        if asked.binary if wanted is None else wanted:
            tail.append(_bytes(array))
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            plain = array.astype(np.float32) if array.dtype.kind == "V" else array
            finite = finite and bool(np.isfinite(plain).all())
            entry["data"] = plain.ravel().tolist()
        told.append(entry)
    head = _answer(model, told)
    if asked.id is not None:
        head["id"] = asked.id
    text = _text(head, finite=finite)
    return [text, *tail], len(text) if tail else None


def _all_binary(model: str, outputs: Mapping[str, Array]) -> tuple[list[bytes | memoryview], int | None]:
    """As most clients ask; of outputs of one form the JSON is the same each time."""
    key = (model, *((name, array.dtype, array.shape) for name, array in outputs.items()))
    text = _answers.get(key)
    if text is None:
        told = [{**_entry(n, a), "parameters": {"binary_data_size": a.nbytes}} for n, a in outputs.items()]
        text = _text(_answer(model, told), finite=True)
        _keep(_answers, key, text)
    return [text, *map(_bytes, outputs.values())], len(text) if outputs else None


def _answer(model: str, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"model_name": model, "model_version": "1", "outputs": outputs}


def _entry(name: str, array: Array) -> dict[str, Any]:
    """Of an output, without its numbers. Raises `InvalidRequest`."""
    return {"name": name, "datatype": datatype_of(name, array), "shape": list(array.shape)}


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def metadata(model: str, platform: str, tensors: tuple[Sequence[Tensor], Sequence[Tensor]] | None) -> dict[str, Any]:
    """Of the model; sizes that may vary are -1."""
    inputs, outputs = ([_described(t) for t in part] for part in tensors or ((), ()))
    return {"name": model, "versions": ["1"], "platform": platform, "inputs": inputs, "outputs": outputs}


def _described(tensor: Tensor) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) and dim >= 0 else -1 for dim in tensor.shape]
    return {"name": tensor.name, "datatype": DATATYPES.get(tensor.dtype, tensor.dtype.upper()), "shape": shape}
