"""What TensorRT says, as typed failures: parser errors by node, and why a build gave nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.backends.tensorrt.graph import gpu_out_of_memory
from workers.backends.tensorrt.library import Library

if TYPE_CHECKING:
    import tensorrt

T = TypeVar("T")

# Who runs a model that TensorRT refuses, the most promising first.
INSTEAD = "onnxruntime-cuda and onnxruntime"
_MOST_LINES = 200
_MOST_NAMED = 8
# The parser's own words are often the C++ condition that did not hold.
_QUOTED = re.compile(r'&&\s*"([^"]+)"')
_ASSERTION = re.compile(r"Assertion failed: .*?: (.+)$", re.DOTALL)
_API_ERROR = re.compile(r"Error Code \d+: [\w ]+ \((.+?)(?: In \w+ at [^)]*)?\)", re.DOTALL)
_CONDITION = re.compile(r"^(?:Assertion failed: )?(?:false|[\w:.()!<>=&| ]*[(=!<>].*)$")
_NO_PLUGIN = re.compile(r"plugin (?:not found|creator .*not found)", re.IGNORECASE)
_REFUSED = re.compile(r"not supported|unsupported|only .* (?:is|are) supported", re.IGNORECASE)
_NOT_A_NODE_LIST = re.compile(r"ForeignNode\[(\S+?)[\].]")
_NODE = re.compile(r"(?:implementation for node|node name:?|layer) ['\"]?([^'\",\s\]]+)", re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|insufficient (?:device )?memory|cudaErrorMemoryAllocation", re.IGNORECASE
)
_PROFILE = re.compile(r"optimization profile|kMIN|kOPT|kMAX|dynamic (?:shape|dimension)|min/opt/max", re.IGNORECASE)
_DRIVER = re.compile(
    r"insufficient driver|CUDA initialization failure|no CUDA-capable device|CUDA driver version", re.IGNORECASE
)


class Log:
    """TensorRT's warnings and errors, in order, the first 200 of each; lines of other threads come in between."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def add(self, error: bool, message: str) -> None:
        lines = self.errors if error else self.warnings
        if len(lines) < _MOST_LINES:
            lines.append(message[:2000])

    def last(self) -> str:
        return self.errors[-1] if self.errors else "it gave no reason"

    def text(self) -> str:
        return "\n".join(self.errors)


def make_logger(library: Library, log: Log) -> tensorrt.ILogger:
    """A `trt.ILogger` that collects; must outlive every object it was given to."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.load()
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Collecting(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if severity in errors or severity == trt.ILogger.Severity.WARNING:
                log.add(severity in errors, msg)

    return Collecting()


def parser_errors(parser: tensorrt.OnnxParser) -> list[dict[str, Any]]:
    """Every error of the ONNX parser: code, node (name, or its index), op, reason."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, op, node = _text(error.node_name), _text(error.node_operator), int(error.node())
        found.append(
            {
                "code": str(error.code().name),
                "node": name or (f"#{node}" if node >= 0 else None),
                "op": op or None,
                "reason": _reason(_text(error.desc), _text(error.func)),
            }
        )
    return found


def _text(call: Callable[[], str | None]) -> str:
    """Names come from the file as they are; the binding raises where that is no UTF-8."""
    try:
        return str(call() or "")
    except UnicodeDecodeError as error:
        return bytes(error.object).decode(errors="replace")


def parser_error(code: str, reason: str) -> dict[str, Any]:
    """One that the parser did not tell of by itself."""
    return {"code": code, "node": None, "op": None, "reason": reason[:1000]}


def _reason(said: str, function: str) -> str:
    """What the parser said, without its C++; "false", in the check of an operator, means that it has none."""
    if _NO_PLUGIN.search(said):
        return "TensorRT's ONNX parser knows no such operator"
    if said.strip() == "false" and function.startswith("check"):
        return "TensorRT's ONNX parser does not support this operator"
    for pattern in (_API_ERROR, _QUOTED, _ASSERTION):
        if found := pattern.search(said):
            return found.group(1).strip()[:1000]
    if _CONDITION.match(said):
        return f"it does not hold that {said.removeprefix('Assertion failed: ').strip()[:900]} ({function})"
    return said[:1000]


def refuses(error: Mapping[str, Any]) -> bool:
    """Whether TensorRT cannot take what is there, rather than that the graph is not valid."""
    code, reason = str(error["code"]), str(error["reason"])
    names = code.startswith("UNSUPPORTED") and (
        error["node"] or error["op"]
    )  # else it is what the parser could not read
    return bool(names or reason.startswith("TensorRT's ONNX parser") or _REFUSED.search(reason))


def parse_failure(errors: Sequence[dict[str, Any]], log: Log) -> StageFailure:
    """The failure of a parse: `unsupported_op` with every node named, `gpu_out_of_memory`, or `parse_failed`."""
    unsupported = [e for e in errors if refuses(e)]
    if unsupported:
        first = unsupported[0]
        named = [f"{e['node'] or '?'} ({e['op'] or 'op unknown'}): {e['reason']}" for e in unsupported[:_MOST_NAMED]]
        more = f"; and {len(unsupported) - _MOST_NAMED} more" if len(unsupported) > _MOST_NAMED else ""
        ops = sorted({str(e["op"]) for e in unsupported if e["op"]})
        return model_failure(
            "unsupported_op",
            f"TensorRT cannot take {', '.join(ops) or 'a part'} of this model. {'; '.join(named)}{more}.",
            node=first["node"],
            remedy=f"The backends {INSTEAD} run the whole model; or export it without these operators.",
        )
    if any(e["code"] == "MEM_ALLOC_FAILED" for e in errors):
        return gpu_out_of_memory("TensorRT could not take in the model's weights")
    first = errors[0] if errors else {"node": None, "op": None, "reason": log.last()}
    return model_failure(
        "parse_failed",
        f"TensorRT's ONNX parser refuses the model: {first['reason']}",
        node=first["node"],
        remedy=f"Check the model with onnx.checker; the backends {INSTEAD} may run it.",
    )


def build_failure(log: Log, gpu: str) -> StageFailure:
    """Why `build_serialized_network` gave None, from what TensorRT logged."""
    text = log.text()
    if "timing cache" in text.lower() and "miss" in text.lower():
        return StageFailure(
            "timing_cache_miss",
            "An exact rebuild was asked for, and the timing cache does not hold every layer of this model.",
            FailureKind.REQUEST,
            remedy="Build once without `exact_timing` and keep the timing cache.",
            cacheable=False,
        )
    if _MEMORY.search(text):
        return gpu_out_of_memory(f"building on {gpu} needed more than is free")
    if _DRIVER.search(text):
        return driver_failure(log.last())
    if _PROFILE.search(text):
        return model_failure(
            "invalid_profile",
            f"TensorRT refuses the optimization profiles: {log.last()}",
            remedy="Give `shapes` with the smallest, usual and largest shape the model really takes.",
        )
    node = _NOT_A_NODE_LIST.search(text) or _NODE.search(text)
    return model_failure(
        "engine_build_failed",
        f"TensorRT built no engine: {log.last()}",
        node=node.group(1).rstrip(".") if node else None,
        remedy=f"Raise the workspace limit, or let the backends {INSTEAD} run the model.",
        cacheable=False,
    )


def driver_failure(reason: str) -> StageFailure:
    return StageFailure(
        "gpu_unavailable",
        f"TensorRT does not work with this machine's driver: {reason}",
        FailureKind.INFRASTRUCTURE,
        remedy="Install a driver that fits the CUDA version of TensorRT (docs/gpu.md has the table).",
        cacheable=False,
    )


def load_failure(log: Log) -> StageFailure:
    """Why `deserialize_cuda_engine` gave None."""
    text = log.text()
    if _MEMORY.search(text):
        return gpu_out_of_memory("the engine does not fit beside what is loaded")
    if "version" in text.lower() or "compute capability" in text.lower() or "incompatible" in text.lower():
        return StageFailure(
            "engine_incompatible",
            f"The engine cannot be loaded here: {log.last()}",
            FailureKind.MODEL,
            remedy="Run the job again on this machine: the engine is then built for what is installed here.",
            cacheable=False,
        )
    return StageFailure(
        "load_failed",
        f"TensorRT does not load the engine: {log.last()}",
        remedy="Run the job again on this machine.",
        cacheable=False,
    )


def called(what: str, ok: Any, log: Log, *, tensor: str | None = None) -> None:
    """Check what a call of the runtime returned; raises StageFailure(`inference_failed`)."""
    if not ok:
        failure = StageFailure(
            "inference_failed", f"TensorRT refused to {what}: {log.last()}", FailureKind.MODEL, tensor=tensor
        )
        raise gpu_out_of_memory(log.last()) if _MEMORY.search(log.text()) else failure


def guarded(what: str, log: Log, call: Callable[[], T]) -> T:
    """`call()`, with what the binding raises as StageFailure(`inference_failed`)."""
    try:
        return call()
    except StageFailure:
        raise
    except Exception as error:  # pybind11 raises RuntimeError, TypeError and ValueError
        raise StageFailure("inference_failed", f"TensorRT failed to {what}: {error}; {log.last()}"[:1000]) from error
