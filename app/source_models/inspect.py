"""What an uploaded model file is: format, inputs, outputs, opset; decided by content, without any ML library.

Memory is flat in the size of the file. Every refusal is `invalid_model`, or one of the `archive_*` codes of
`app.archives`, and says what is wrong, where, and what to do.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.archives import Archive, ArchiveLimits, Limits, Member, archive_kind, open_archive
from app.domain.limits import INT32_MAX
from app.errors import AppError, invalid_model
from app.source_models.foreign_formats import MAKE_PT2, foreign_archive, foreign_format
from app.source_models.onnx_header import ExternalTensor, OnnxHeader, TensorInfo, read_onnx_header
from app.source_models.outline import outline
from app.source_models.pt2_header import pt2_graph_member, read_pt2_header

ModelFormat = Literal["onnx", "archive", "pt2"]

_HEAD_BYTES = 4096
_MAX_DESCRIPTION_BYTES = 1 << 20  # it comes back with every answer about the model
_NEEDS_ARCHIVE = (
    "Send the .onnx and its data files together: dropped at once onto a page, they are; `anneal` and the client take "
    "them along; for curl, pack them into one .zip or .tar (`tar cf model.tar model.onnx*`)."
)
_NOT_TENSORS = {"sequence", "map", "optional", "sparse_tensor", "opaque"}
_EXTENSIONS: dict[str, str] = {
    ".onnx": "onnx",
    ".pt2": "pt2",
    ".zip": "archive",
    ".tar": "archive",
    ".tar.gz": "archive",
    ".tgz": "archive",
}
_HOLDS = {"onnx": "an ONNX model", "pt2": "a torch.export program", "archive": "an archive"}


@dataclass(frozen=True)
class ModelInfo:
    """`opset` is that of ai.onnx (None for .pt2). `ops` counts nodes by op type. `external_data` names the data files
    beside the .onnx. `detail` is JSON: for ONNX ir_version, opset_imports, graph_name, nodes, parameters, functions
    and, in an archive, `model_member`; for .pt2 `torch_version` and whether the signature could be read; for both
    `outline`, the ops in order."""

    format: ModelFormat
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    opset: int | None
    producer: str | None
    ops: dict[str, int]
    external_data: list[str] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)


def describe_model(path: Path, filename: str, limits: ArchiveLimits) -> dict[str, Any]:
    """The columns of an uploaded model's row, as JSON. Raises what `inspect_model` raises."""
    info = inspect_model(path, filename, limits)
    columns = {
        "format": info.format,
        "inputs": info.inputs,
        "outputs": info.outputs,
        "opset": info.opset,
        "detail": {"producer": info.producer, "ops": info.ops, "external_data": info.external_data, **info.detail},
    }
    size = len(json.dumps(columns))
    if size > _MAX_DESCRIPTION_BYTES:
        raise invalid_model(
            f"The names of its inputs, outputs, ops and data files take {size} bytes; at most {_MAX_DESCRIPTION_BYTES} "
            "are taken.",
            remedy="Export the model with short names, and its weights into one data file.",
        )
    return columns


def inspect_model(path: Path, filename: str, limits: ArchiveLimits) -> ModelInfo:
    """`filename` is what the client calls the file: its extension must not contradict the content."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if not head:
            raise invalid_model("The file is empty.", remedy="Upload the model's bytes as the body of the request.")
        if foreign := foreign_format(head, filename):
            raise invalid_model(
                f"The file is not a model this service takes: it is {foreign.what}.", remedy=foreign.remedy
            )
        if archive_kind(file) is not None:
            with _archive_damage_is_invalid_model(), open_archive(path, Limits.of(limits)) as archive:
                return _inspect_archive(archive, filename)
        _check_extension(filename, "onnx", head)
        size = path.stat().st_size
        file.seek(0)
        header = read_onnx_header(file, size)
    _check_interface(header)
    if header.external:
        first = header.external[0]
        raise invalid_model(
            f"The weights of {len(header.external)} tensors, the first of them {first.tensor!r}, stand in another "
            f"file ({first.location!r}), which did not come along.",
            tensor=first.tensor,
            remedy=_NEEDS_ARCHIVE,
        )
    return _onnx_info("onnx", header, {})


@contextmanager
def _archive_damage_is_invalid_model() -> Iterator[None]:
    """A damaged archive is a file that is not what it says; unsafe ones keep their own codes."""
    try:
        yield
    except AppError as e:
        if e.code != "archive_invalid":
            raise
        raise invalid_model(e.detail, remedy=e.remedy) from e


def _check_extension(filename: str, found: ModelFormat, head: bytes = b"") -> None:
    lower = filename.lower()
    says = next((kind for extension, kind in _EXTENSIONS.items() if lower.endswith(extension)), found)
    if says == found or (says == "archive" and found == "pt2"):
        return
    if found == "onnx" and head[:1] not in (b"\x08", b"\x3a"):
        # Not an ONNX file either, as far as one can see.
        raise invalid_model(
            f"The file {filename[:200]!r} does not hold {_HOLDS[says]}.",
            remedy="Check that the right file was uploaded, and all of it.",
        )
    raise invalid_model(
        f"The file is named {filename[:200]!r} and holds {_HOLDS[found]}.",
        remedy=f"Give it a name that ends with {next(e for e, kind in _EXTENSIONS.items() if kind == found)}.",
    )


def _inspect_archive(archive: Archive, filename: str) -> ModelInfo:
    # What macOS and Windows put beside the files is none of the model.
    members = [m for m in archive.members if "__MACOSX" not in m.name.split("/")]
    members = [m for m in members if not posixpath.basename(m.name).startswith("._")]
    names = {m.name: m for m in members}
    if archive.kind == "zip" and (graph := pt2_graph_member(names)):
        _check_extension(filename, "pt2")
        return _inspect_pt2(archive, names[graph])
    models = [m for m in members if m.name.lower().endswith(".onnx")]
    if not models:
        if foreign := foreign_archive(names):
            raise invalid_model(
                f"The file is not a model this service takes: it is {foreign.what}.", remedy=foreign.remedy
            )
        if filename.lower().endswith(".pt2"):
            raise invalid_model("The .pt2 holds no exported graph.", remedy=MAKE_PT2)
        raise invalid_model(
            f"The archive holds {len(members)} files and no .onnx among them.",
            remedy="Pack one .onnx and its data files.",
        )
    if len(models) > 1:
        raise invalid_model(
            f"The archive holds {len(models)} models: {', '.join(repr(m.name) for m in models[:5])}.",
            remedy="Upload each model by itself, with its own data files.",
        )
    _check_extension(filename, "archive")
    model = models[0]
    header = read_onnx_header(archive.open(model.name), model.size)
    _check_interface(header)
    _check_external(header.external, model, names)
    return _onnx_info("archive", header, {"model_member": model.name})


def _inspect_pt2(archive: Archive, graph: Member) -> ModelInfo:
    header = read_pt2_header(archive.open(graph.name), graph.size)
    if header.readable and not header.inputs:
        raise invalid_model(
            "The exported program takes no tensor as input.",
            remedy="Export it with the tensors it computes on as example_inputs.",
        )
    return ModelInfo(
        format="pt2",
        inputs=header.inputs,
        outputs=header.outputs,
        opset=None,
        producer=f"torch {header.torch_version}" if header.torch_version else None,
        ops=header.ops,
        detail={
            "torch_version": header.torch_version or None,
            "signature_read": header.readable,
            "outline": outline(header.order, sum(header.ops.values())),
        },
    )


def _onnx_info(model_format: ModelFormat, header: OnnxHeader, detail: dict[str, Any]) -> ModelInfo:
    for number, what in (
        (header.ir_version, "IR version"),
        *((v, "operator set") for v in header.opset_imports.values()),
    ):
        if not 0 <= number <= INT32_MAX:
            raise invalid_model(
                f"The file is not a valid ONNX model: there is no {what} {number}.",
                remedy="Check that the whole file was uploaded, or export the model again.",
            )
    opset = header.opset_imports.get("ai.onnx")
    if opset is None and not any(domain != "ai.onnx" for domain in header.opset_imports):
        raise invalid_model(
            "The file is not a valid ONNX model: it imports no operator set, so it may be truncated.",
            remedy="Check that the whole file was uploaded, or export the model again.",
        )
    return ModelInfo(
        format=model_format,
        inputs=header.inputs,
        outputs=header.outputs,
        opset=opset,
        producer=f"{header.producer_name} {header.producer_version}".strip() or None,
        ops=header.ops,
        external_data=sorted({_relative(t) for t in header.external}),
        detail={
            "ir_version": header.ir_version,
            "opset_imports": header.opset_imports,
            "graph_name": header.graph_name,
            "nodes": header.nodes,
            "parameters": header.parameters,
            "functions": header.functions,
            "outline": outline(header.order, header.own_nodes),
            **detail,
        },
    )


def _check_interface(header: OnnxHeader) -> None:
    """Inputs and outputs that no engine could be fed with or compared by."""
    if not header.inputs:
        raise invalid_model(
            "The model has no inputs, so it computes nothing but constants.",
            remedy="Export the model with the tensors it computes on as graph inputs.",
        )
    if not header.outputs:
        raise invalid_model("The model has no outputs.", remedy="Export the model with at least one graph output.")
    for tensors, what in ((header.inputs, "input"), (header.outputs, "output")):
        for info in tensors:
            _check_tensor(info, what)


def _check_tensor(info: TensorInfo, what: str) -> None:
    name, dtype = info["name"], info["dtype"]
    if not name:
        raise invalid_model(f"An {what} of the model has no name.", remedy="Export the model again.")
    if dtype in _NOT_TENSORS:
        raise invalid_model(
            f"The {what} {name!r} is a {dtype.replace('_', ' ')}, not a tensor.",
            tensor=name,
            remedy="Export the model with tensors only; with skl2onnx pass options={'zipmap': False}.",
        )
    if what == "output":
        return
    if dtype == "string":
        raise invalid_model(
            f"The input {name!r} takes strings.",
            tensor=name,
            remedy="Tokenize or encode outside of the model, and export the part that takes numbers.",
        )
    if dtype == "undefined" or dtype.startswith(("unknown_", "complex")):
        raise invalid_model(
            f"The input {name!r} has the element type {dtype}.",
            tensor=name,
            remedy="Export the model with a number type for every input.",
        )
    if info["shape"] is None:
        raise invalid_model(
            f"The input {name!r} has no fixed number of dimensions (dynamic rank).",
            tensor=name,
            remedy="Export the model with a shape for this input; single dimensions may be symbolic.",
        )


def _relative(tensor: ExternalTensor) -> str:
    return posixpath.normpath(tensor.location)


def _check_external(tensors: Sequence[ExternalTensor], model: Member, names: Mapping[str, Member]) -> None:
    folder = posixpath.dirname(model.name)
    for tensor in tensors:
        where = f"The external data of the tensor {tensor.tensor!r}"
        location = tensor.location
        parts = location.split("/")
        if location.startswith("/") or ".." in parts or "\\" in location or ":" in parts[0] or "\0" in location:
            raise invalid_model(
                f"{where} points outside of the archive: {location[:200]!r}.",
                tensor=tensor.tensor,
                remedy="Save the model again with its data beside it: "
                "`onnx.save(model, 'model.onnx', save_as_external_data=True, location='model.onnx.data')`.",
            )
        member = names.get(posixpath.normpath(posixpath.join(folder, location)))
        if member is None:
            raise invalid_model(
                f"{where} is missing: there is no file {location[:200]!r} beside {model.name!r} in the archive.",
                tensor=tensor.tensor,
                remedy=_NEEDS_ARCHIVE,
            )
        if tensor.offset + (tensor.size_bytes or 0) > member.size:
            raise invalid_model(
                f"{where} needs bytes {tensor.offset} to {tensor.offset + (tensor.size_bytes or 0)} of "
                f"{location[:200]!r}, which has {member.size}.",
                tensor=tensor.tensor,
                remedy="The data file is truncated or of another model: save both again, and pack them together.",
            )
