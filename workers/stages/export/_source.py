"""From the uploaded file to a parsed model whose external data is known to be there and inside its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

from onnx import GraphProto, ModelProto, TensorProto, helper

from app.archives import extract
from app.domain.failures import FailureKind, StageFailure, model_failure
from app.errors import AppError
from workers.graph.onnx_files import INLINE_LIMIT_BYTES, read_skeleton
from workers.graph.onnx_graph import all_nodes, all_tensors, external_tensors, subgraphs

_FOUR_BIT = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1})
_PROTOBUF_LIMIT = 2**31 - 1
_MAKE_PT2 = "Save it as torch.export.save(torch.export.export(model.eval(), (example,)), 'model.pt2') and upload that."
_PACK = "Upload one .zip or .tar with the .onnx file and all files its weights lie in, paths unchanged."


@dataclass(frozen=True)
class External:
    """Where one tensor's bytes lie: `file`, and the range in it."""

    file: Path
    offset: int
    length: int


def unpack(archive: Path, into: Path, *, max_bytes: int, max_members: int, max_ratio: float) -> Path:
    """Extract a .zip or .tar and return its one .onnx file; raises StageFailure with the archive's error code."""
    try:
        files = extract(archive, into, max_bytes=max_bytes, max_members=max_members, max_ratio=max_ratio)
    except AppError as error:
        raise as_failure(error) from None
    models = [f for f in files if f.suffix.lower() == ".onnx" and _is_content(f.relative_to(into))]
    if len(models) == 1:
        return models[0]
    found = ", ".join(sorted(f.name for f in models)[:5])
    raise model_failure(
        "invalid_model",
        f"The archive holds {len(models)} .onnx files ({found})." if models else "The archive holds no .onnx file.",
        remedy="Pack exactly one .onnx file, with its external data beside it.",
    )


def as_failure(error: AppError) -> StageFailure:
    """An error of `app.archives` as a stage's failure: a full disk is no fault of the model."""
    kind = FailureKind.INFRASTRUCTURE if error.retryable else FailureKind.MODEL
    return StageFailure(error.code, error.detail, kind, remedy=error.remedy, cacheable=not error.retryable)


def _is_content(path: Path) -> bool:
    """False for what packers of some systems add: `__MACOSX/` and hidden files."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def parse(path: Path) -> ModelProto:
    """The model without external data; raises StageFailure `invalid_model` where the file is none."""
    size = path.stat().st_size
    if size > _PROTOBUF_LIMIT:
        raise model_failure(
            "invalid_model",
            f"{path.name} has {size} bytes; one ONNX file cannot pass 2 GiB.",
            remedy="Save it with external data (onnx.save_model(..., save_as_external_data=True)) and pack both.",
        )
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")):
        raise model_failure(
            "invalid_model", "The file is a Python pickle or TorchScript, which is never loaded.", remedy=_MAKE_PT2
        )
    try:
        model = read_skeleton(path)
    except Exception:  # protobuf's DecodeError, which has no published types
        _not_onnx(f"{path.name} cannot be parsed as ONNX: it is cut off or something else ({size} bytes).")
    graph = model.graph
    if model.ir_version <= 0 or not (graph.node or graph.output or graph.input):
        _not_onnx(f"{path.name} is no ONNX model: it has no graph.")
    if not all(isinstance(text, str) for text in _texts(model)):  # protobuf gives bytes for what is not UTF-8
        _not_onnx(f"{path.name} is damaged: it has names that are not UTF-8.")
    return model


def _texts(model: ModelProto) -> Iterator[object]:
    """Every name in the model that code here and elsewhere relies on."""
    for node in all_nodes(model):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
        for body in subgraphs(node):
            yield from _infos(body)
    yield from _infos(model.graph)
    for tensor in all_tensors(model):
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
    yield from (opset.domain for opset in model.opset_import)


def _infos(graph: GraphProto) -> Iterator[object]:
    for info in (*graph.input, *graph.output, *graph.value_info):
        yield info.name
        yield from (dim.dim_param for dim in info.type.tensor_type.shape.dim)


def _not_onnx(detail: str) -> NoReturn:
    raise model_failure("invalid_model", detail, remedy="Upload the file as the exporter wrote it, whole.")


def locate(model: ModelProto, folder: Path) -> list[External]:
    """Where each of `external_tensors(model)` lies, in their order; `folder` is that of the model file.

    Raises StageFailure `external_data_outside`, `external_data_missing` or `invalid_model`, with the tensor.
    """
    root = folder.resolve()
    return [_locate_one(t, root) for t in external_tensors(model)]


def _locate_one(tensor: TensorProto, root: Path) -> External:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    if not location or location.startswith("/") or ".." in parts or "\\" in location or ":" in location:
        raise model_failure(
            "external_data_outside",
            f"The data of tensor {tensor.name!r} lies at {location!r}, which is not a path inside the archive.",
            tensor=tensor.name,
            remedy="Save the model with external data in files beside the .onnx file.",
        )
    path = root.joinpath(*parts)
    if path.is_symlink() or not path.resolve().is_relative_to(root):
        raise model_failure(
            "external_data_outside", f"{location!r} is a link.", tensor=tensor.name, remedy="Pack regular files only."
        )
    if not path.is_file():
        raise model_failure(
            "external_data_missing",
            f"The data of tensor {tensor.name!r} lies in {location!r}, which was not uploaded.",
            tensor=tensor.name,
            remedy=_PACK,
        )
    try:
        offset, length = int(entries.get("offset") or 0), byte_size(tensor)
        given = int(entries["length"]) if entries.get("length") else length
    except (ValueError, KeyError, TypeError):
        raise model_failure(
            "invalid_model", f"Tensor {tensor.name!r} has invalid dimensions, type or offsets.", tensor=tensor.name
        ) from None
    size = path.stat().st_size
    if offset < 0 or given != length or offset + length > size:
        raise model_failure(
            "external_data_missing" if offset + length > size else "invalid_model",
            f"Tensor {tensor.name!r} has {length} bytes; its range is {given} at {offset} of {location!r} ({size}).",
            tensor=tensor.name,
            remedy="Upload the data file that belongs to this model, whole.",
        )
    return External(path, offset, length)


def byte_size(tensor: TensorProto) -> int:
    """Bytes of a tensor's data, from its dimensions and type; raises ValueError or KeyError where these are invalid."""
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError("a negative dimension")
    count: int = math.prod(tensor.dims)
    if tensor.data_type in _FOUR_BIT:
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def inline_external(model: ModelProto, where: Sequence[External]) -> bool:
    """Take external data into the model where all of it fits; returns whether it did. `where`: `locate`'s answer."""
    if model.ByteSize() + sum(at.length for at in where) > INLINE_LIMIT_BYTES:
        return False
    for tensor, at in zip(external_tensors(model), where, strict=True):
        with at.file.open("rb") as file:
            file.seek(at.offset)
            tensor.raw_data = file.read(at.length)
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    return True


def point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make `tensor` external, with its bytes at this range of `location`."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def copy_range(source: Path, offset: int, length: int, target: BinaryIO) -> None:
    """Write a range of a file to `target`; memory stays flat."""
    with source.open("rb") as file:
        file.seek(offset)
        while length > 0:
            block = file.read(min(length, 8 << 20))
            if not block:
                raise model_failure("external_data_missing", f"{source.name} is cut off.")
            target.write(block)
            length -= len(block)
