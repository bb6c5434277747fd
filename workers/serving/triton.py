"""A model repository of NVIDIA's Triton Inference Server for a delivered engine: `config.pbtxt`, the version's folder,
data to warm up with. Field names and meanings: Triton's `model_config.proto`, its documents on model repositories and
model configuration.

It is texts and a list of which of the bundle's files go where: the engine's own files are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from app.artifacts.protobuf_text import Word, text_format
from workers.kernel import TensorSpec
from workers.serving.native import PYTHON, InTriton
from workers.serving.triton_model import MODEL

if TYPE_CHECKING:
    from workers.kernel import Arrays

FOLDER = "triton"  # of the bundle, where these texts are kept
VERSION = "1"
_NO_BATCH = "the batch is not the first axis of every input and output, or is fixed: requests are served one by one"
_LABELS = "labels.txt"
_MOST_WARM_UPS = 8  # batch sizes: each is run when the model is loaded
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}


class NotServable(Exception):
    """Triton cannot serve this engine; the message says why."""


@dataclass(frozen=True)
class Served:
    """An engine that is to be served. `batched`: the first axis of every input and output is the batch, which was
    tried. `sample`: one call's inputs. `serving`: the settings (`serving.json`). `accepts`: as in the bundle's
    manifest. `group`: Triton's kind of instances (`KIND_CPU`). `script`: `infer.py` and what it needs beside itself,
    name there → member of the bundle. `labels`: names of the classes, by number. `formed`: sizes of the batches that
    formed under the job's traffic. `folder`: of the bundle, where its texts are kept."""

    name: str
    machine: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    sample: Arrays
    batched: bool
    serving: Mapping[str, Any]
    group: str
    native: InTriton
    versions: Mapping[str, str]
    script: Mapping[str, str]
    accepts: Mapping[str, Sequence[Sequence[int | None] | None]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    formed: Sequence[int] = ()
    folder: str = FOLDER


@dataclass(frozen=True)
class Repository:
    """`texts`: members for the bundle, by name. `files`: path in the repository → the bundle's member. `model`: what
    another model of the same server has to know of this one (`app.artifacts.ensembles`)."""

    texts: dict[str, bytes]
    files: dict[str, str]
    notes: list[str]
    model: dict[str, Any]


def repository(served: Served) -> Repository:
    """Raises `NotServable`."""
    for spec in (*served.inputs, *served.outputs):
        if spec.dtype not in _TYPES or (served.native.backend == PYTHON and spec.dtype == "bfloat16"):
            raise NotServable(f"Triton has no type for {spec.name!r}, which is {spec.dtype}.")
    home, folder = served.name, served.folder
    texts = {f"{folder}/warmup/input_{i}": served.sample[s.name][_one(served)].tobytes() for i, s in _warmed(served)}
    files = {f"{home}/{path.removeprefix(f'{folder}/')}": path for path in texts}
    version = f"{home}/{VERSION}"
    if served.native.backend == PYTHON:
        texts[f"{folder}/model.py"] = MODEL.encode()
        files[f"{version}/model.py"] = f"{folder}/model.py"
        files |= {f"{version}/{name}": member for name, member in served.script.items()}
    else:
        files |= {f"{version}/{name}": member for name, member in served.native.files.items()}
    if any(_classes(spec, served) for spec in served.outputs):
        texts[f"{folder}/{_LABELS}"] = "".join(f"{label}\n" for label in served.labels).encode()
        files[f"{home}/{_LABELS}"] = f"{folder}/{_LABELS}"
    notes = [*_notes(served)]
    texts[f"{folder}/config.pbtxt"] = _config(served, notes).encode()
    texts[f"{folder}/README.md"] = _readme(served, notes).encode()
    files |= {f"{home}/{name}": f"{folder}/{name}" for name in ("config.pbtxt", "README.md")}
    return Repository(texts, files, notes, interface(served))


def max_batch(served: Served) -> int:
    """Triton's `max_batch_size`; 0 where the batch is not the first axis of all tensors."""
    if not served.batched:
        return 0
    most = [int(served.serving["max_batch"]), served.native.most_batch]
    most += [bounds[0][1] for bounds in served.accepts.values() if bounds and bounds[0]]
    return max(1, min(size for size in most if size is not None))


def _config(served: Served, notes: Sequence[str]) -> str:
    most = max_batch(served)
    seen = interface(served)
    config: dict[str, Any] = {"name": seen["name"], "backend": served.native.backend, **seen}
    labelled = {"label_filename": _LABELS}
    config["output"] = [
        told | (labelled if _classes(spec, served) else {})
        for spec, told in zip(served.outputs, seen["output"], strict=True)
    ]
    group: dict[str, Any] = {"count": int(served.serving["instances"]), "kind": Word(served.group)}
    if served.native.profiles > 1:
        group["profile"] = [str(i) for i in range(served.native.profiles)]
    config["instance_group"] = [group]
    config["version_policy"] = {"latest": {"num_versions": 1}}
    if most > 1:
        config["dynamic_batching"] = _batching(served.serving, most)
    config["model_warmup"] = [_warm_up(served, size) for size in _warm_sizes(served, most)]
    if served.native.parameters:
        told = sorted(served.native.parameters.items())
        config["parameters"] = [{"key": key, "value": {"string_value": value}} for key, value in told]
    config |= {k: v for k, v in served.native.config.items() if v}
    head = [f"# {served.name}, built and measured on {served.machine}.", *(f"# {_one_line(note)}" for note in notes)]
    return "\n".join([*head, *text_format({k: v for k, v in config.items() if v != []})]) + "\n"


def interface(served: Served) -> dict[str, Any]:
    """Of the model, as `config.pbtxt` has it."""
    most = max_batch(served)
    return {
        "name": served.name,
        "max_batch_size": most,
        "input": [_tensor(spec, served, most) for spec in served.inputs],
        "output": [_tensor(spec, served, most) for spec in served.outputs],
    }


def _tensor(spec: TensorSpec, served: Served, most: int) -> dict[str, Any]:
    dims = [_dim(dim, bound) for dim, bound in zip(spec.shape, _bounds(spec, served), strict=True)]
    dims = dims[1:] if most else dims
    told: dict[str, Any] = {"name": spec.name, "data_type": Word(_TYPES[spec.dtype]), "dims": dims or [1]}
    if not dims and most:
        told["reshape"] = {"shape": []}  # a number for each sample: Triton's dims are never empty
    return told


def _classes(spec: TensorSpec, served: Served) -> bool:
    """Whether it holds a number for each class that has a name."""
    return bool(served.labels) and spec.dtype.startswith("float") and spec.shape[1:] == (len(served.labels),)


def _bounds(spec: TensorSpec, served: Served) -> Sequence[Sequence[int | None] | None]:
    return served.accepts.get(spec.name) or [None] * len(spec.shape)


def _dim(dim: int | str, bound: Sequence[int | None] | None) -> int:
    """-1 where any size will do; the one size that was judged, where it is one."""
    if isinstance(dim, int) and dim > 0:
        return dim
    return bound[0] if bound and bound[0] is not None and bound[0] == bound[1] else -1


def _batching(serving: Mapping[str, Any], most: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    preferred = sorted({int(size) for size in serving.get("preferred_batches") or () if 1 < size <= most})
    if preferred:
        told["preferred_batch_size"] = preferred
    told["max_queue_delay_microseconds"] = round(1000 * float(serving.get("max_delay_ms") or 0))
    if limit := serving.get("queue_limit"):
        told["default_queue_policy"] = {"max_queue_size": int(limit)}
    return told


def _warm_sizes(served: Served, most: int) -> list[int]:
    """The batch sizes to warm up with: one, the preferred ones, those that formed under the traffic, the largest."""
    preferred = [int(size) for size in served.serving.get("preferred_batches") or () if size < most]
    sizes = sorted({1, *preferred, *(size for size in served.formed if size < most), max(most, 1)})
    return [*sizes[: _MOST_WARM_UPS - 1], sizes[-1]] if len(sizes) > _MOST_WARM_UPS else sizes


def _warmed(served: Served) -> list[tuple[int, TensorSpec]]:
    return list(enumerate(served.inputs))


def _one(served: Served) -> slice | EllipsisType:
    """Of a sample's arrays, what one request of a batch has."""
    return slice(0, 1) if served.batched else ...


def _warm_up(served: Served, size: int) -> dict[str, Any]:
    inputs = []
    for index, spec in _warmed(served):
        shape = [int(n) for n in served.sample[spec.name].shape]
        shape = shape[1:] if served.batched else shape
        value = {
            "data_type": Word(_TYPES[spec.dtype]),
            "dims": shape or [1],
            "input_data_file": f"input_{index}",
        }
        inputs.append({"key": spec.name, "value": value})
    return {"name": f"batch {size}", "batch_size": size, "inputs": inputs}


def _notes(served: Served) -> Iterator[str]:
    if served.native.why:
        yield f"Run by Triton's Python backend with the bundle's own infer.py: {served.native.why}."
    yield from served.native.notes
    if not served.batched:
        why = str(served.serving.get("reason") or _NO_BATCH)
        yield f"{why[:1].upper()}{why[1:]} (max_batch_size 0)."
    elif max_batch(served) > 1 and not served.serving.get("max_delay_ms"):
        yield "No request waits for others: batches are formed of those that come while all instances are busy."
    if served.serving.get("pad"):
        yield "Only requests of equal sizes share a batch: Triton does not pad, as the bundle's own server does."
    ranges = [
        f"{spec.name!r} on axis {axis}: {least or 0} to {'any' if most is None else most}"
        for spec in served.inputs
        for axis, (dim, bound) in enumerate(zip(spec.shape, _bounds(spec, served), strict=True))
        if bound and isinstance(dim, str) and bound[0] != bound[1] and not (axis == 0 and served.batched)
        for least, most in [bound]
    ]
    if ranges and served.native.backend != PYTHON:
        yield (
            "Triton does not refuse sizes at which the engine was not judged, as infer.py does; it was judged at "
            f"{'; '.join(ranges)}."
        )


def _readme(served: Served, notes: Sequence[str]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(served.versions.items()))
    lines = [
        f"# {served.name}: a model repository for Triton Inference Server",
        "",
        f"The engine was built and measured on {served.machine}, with {libraries}: the server's backend needs versions "
        "that read its files.",
        "",
        "    tritonserver --model-repository=FOLDER    # that this folder lies in",
        "",
        "Where a note does not say otherwise, sizes and delays of batches, instances and threads are those that were "
        "found best in the job. `warmup/` holds one real or plausible sample, which is run at each batch size when the "
        "model is loaded.",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())
