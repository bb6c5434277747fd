"""gRPC of the Open Inference Protocol v2, beside HTTP: `serve.py --grpc-port 8001`. Needs grpcio and protobuf.

The messages are those of the published `open_inference_grpc.proto` as they lie on the wire (numbers and types of the
fields), made when this is imported; names of messages are not sent. `map<string, InferParameter>` is what protobuf
writes for it, repeated pairs. Tensors come raw or as `contents`, and go raw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

if TYPE_CHECKING:
    from .server import App

if __package__:
    from . import v2
    from .http_messages import HttpError, http_error
    from .rows import Array
    from .serving_settings import ServingError
else:  # beside this file, in a bundle
    import v2  # type: ignore[import-not-found,no-redef]
    from http_messages import HttpError, http_error  # type: ignore[import-not-found,no-redef]
    from rows import Array  # type: ignore[import-not-found,no-redef]
    from serving_settings import ServingError  # type: ignore[import-not-found,no-redef]

_TENSOR = (
    "string name 1; string datatype 2; repeated int64 shape 3; repeated Parameter parameters 4; Contents contents 5"
)
_MESSAGES = {
    "Empty": "",
    "Is": "bool so 1",  # ServerLiveResponse, ServerReadyResponse, ModelReadyResponse
    "Server": "string name 1; string version 2; repeated string extensions 3",
    "Named": "string name 1; string version 2",  # ModelReadyRequest, ModelMetadataRequest
    "Described": "string name 1; string datatype 2; repeated int64 shape 3",
    "Model": "string name 1; repeated string versions 2; string platform 3; repeated Described inputs 4;"
    " repeated Described outputs 5",
    "Choice": "bool bool_param 1; int64 int64_param 2; string string_param 3; double double_param 4;"
    " uint64 uint64_param 5",
    "Parameter": "string key 1; Choice value 2",
    "Contents": "repeated bool bool_contents 1; repeated int32 int_contents 2; repeated int64 int64_contents 3;"
    " repeated uint32 uint_contents 4; repeated uint64 uint64_contents 5; repeated float fp32_contents 6;"
    " repeated double fp64_contents 7; repeated bytes bytes_contents 8",
    "Tensor": _TENSOR,
    "Wanted": "string name 1; repeated Parameter parameters 2",
    "Request": "string model_name 1; string model_version 2; string id 3; repeated Parameter parameters 4;"
    " repeated Tensor inputs 5; repeated Wanted outputs 6; repeated bytes raw_input_contents 7",
    "Response": "string model_name 1; string model_version 2; string id 3; repeated Parameter parameters 4;"
    " repeated Tensor outputs 5; repeated bytes raw_output_contents 6",
}
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_HEADERS = 1 << 20  # of a message, beside its tensors


def _made() -> dict[str, Any]:
    """The class of each message."""
    package = "anneal.serve"
    file = descriptor_pb2.FileDescriptorProto(name="anneal_serve.proto", package=package)
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, text in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for told in filter(None, text.split(";")):
            *repeated, kind, field, number = told.split()
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=int(number), label=label)
            if kind in _MESSAGES:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
                added.options.packed = bool(repeated) and kind not in ("string", "bytes")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    named = {name: pool.FindMessageTypeByName(f"{package}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(found) for name, found in named.items()}


Messages = _made()


class Service:
    """inference.GRPCInferenceService."""

    def __init__(self, app: App, caller_header: str | None) -> None:
        self._app, self._caller_header = app, caller_header and caller_header.lower()

    def handler(self) -> Any:
        """What a grpc.aio server takes."""
        calls = {
            "ServerLive": (self._live, "Empty"),
            "ServerReady": (self._ready, "Empty"),
            "ModelReady": (self._model_ready, "Named"),
            "ServerMetadata": (self._server, "Empty"),
            "ModelMetadata": (self._model, "Named"),
            "ModelInfer": (self._infer, "Request"),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(call),
                request_deserializer=Messages[asked].FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, (call, asked) in calls.items()
        }
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)

    def _answering(self, call: Any) -> Any:
        """A call whose errors end as gRPC's."""

        async def answer(request: Any, context: Any) -> Any:
            try:
                return await call(request, context)
            except HttpError as error:
                told = () if error.retry_after_s is None else (("retry-after", f"{error.retry_after_s:.3f}"),)
                code = _STATUS.get(error.status, grpc.StatusCode.INTERNAL)
                await context.abort(code, f"{error.code}: {error.detail}", told)

        return answer

    async def _live(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return Messages["Is"](so=True)

    async def _ready(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return Messages["Is"](so=self._app.batcher.ready)

    async def _model_ready(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        self._app.check_model(request.name, request.version or None)
        return Messages["Is"](so=self._app.batcher.ready)

    async def _server(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return Messages["Server"](**self._app.about())

    async def _model(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        self._app.check_model(request.name, request.version or None)
        return Messages["Model"](**self._app.metadata())

    async def _infer(self, request: Any, context: Any) -> Any:
        self._app.check_model(request.model_name, request.model_version or None)
        left = context.time_remaining()
        try:
            asked = _asked(request)
            timeout = min(t for t in (left, asked.timeout_s or self._app.timeout_s) if t is not None)
            outputs = await self._app.enqueue(asked, timeout, self._caller(context))
            return _response(self._app.name, asked, outputs)
        except ServingError as error:
            raise http_error(error) from None

    def _caller(self, context: Any) -> str:
        if self._caller_header:
            return str(dict(context.invocation_metadata()).get(self._caller_header, ""))
        return str(context.peer()).rpartition(":")[0]


def _asked(request: Any) -> v2.Asked:
    """Raises `InvalidRequest`."""
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise v2.wrong(f"{len(raw)} raw contents are given for {len(request.inputs)} inputs")
    feeds: dict[str, Any] = {}
    for at, given in enumerate(request.inputs):
        told: dict[str, Any] = {"name": given.name, "shape": list(given.shape), "datatype": given.datatype}
        content = raw[at] if raw else b""
        told["parameters"] = dict(_parameters(given.parameters))
        if raw:
            told["parameters"]["binary_data_size"] = len(content)
        elif (field := _CONTENTS.get(given.datatype)) is not None:
            told["data"] = list(getattr(given.contents, field))
        if given.name in feeds:
            raise v2.wrong(f"input {given.name} is given twice")
        feeds[given.name], _ = v2.tensor(told, content, 0)
    wanted: list[dict[str, Any]] = [
        {"name": output.name, "parameters": dict(_parameters(output.parameters))} for output in request.outputs
    ]
    timeout_s = v2.timeout(dict(_parameters(request.parameters)))
    return v2.Asked(feeds, v2.outputs_of({"outputs": wanted}), True, request.id or None, timeout_s)


def _parameters(told: Sequence[Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for one in told:
        found += [(one.key, value) for _, value in one.value.ListFields()]
    return found


def _response(model: str, asked: v2.Asked, outputs: Mapping[str, Array]) -> Any:
    v2.check_outputs(asked, list(outputs))
    found = Messages["Response"](model_name=model, model_version="1", id=asked.id or "")
    for name in outputs if asked.outputs is None else asked.outputs:
        array = outputs[name]
        found.outputs.add(name=name, datatype=v2.datatype_of(name, array), shape=array.shape)
        found.raw_output_contents.append(array.tobytes())
    return found


async def start(app: App, host: str, port: int, max_bytes: int, caller_header: str | None) -> tuple[Any, int]:
    """The server, which runs, and its port. Raises OSError where it cannot be had."""
    options = [
        ("grpc.max_receive_message_length", max_bytes + _HEADERS),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((Service(app, caller_header).handler(),))
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {host}:{port}: {error}") from None
    await server.start()
    return server, int(bound)
