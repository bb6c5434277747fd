"""What ONNX Runtime's messages and type names say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from app.domain.failures import StageFailure

_NODE_PATTERNS = (
    re.compile(r"running (?P<op>\w+) node\. Name:'(?P<node>[^']*)'"),
    re.compile(r'In Node, \("(?P<node>[^"]*)", (?P<op>\w+)'),
    re.compile(r"Node:\s*\(?(?P<node>[^\s()]+)\)? Op \((?P<op>\w+)\)"),
    re.compile(r"Node \((?P<node>[^)]*)\) Op \((?P<op>\w+)\)"),
    re.compile(r"implementation for (?P<op>\w+)\(-?\d+\) node with name '(?P<node>[^']*)'"),
    re.compile(r"Optype \((?P<op>\w+)\).* in node \((?P<node>[^)]*)\)"),
    re.compile(r"error: (?P<domain>[\w.]*):(?P<op>\w+)\(-?\d+\) is not a registered"),
)
_TENSOR_PATTERNS = (
    re.compile(r"dimensions for input: (\S+) for the"),
    re.compile(r"Invalid rank for input: (\S+)"),
    re.compile(r"Required inputs \(\['([^']+)'"),
    re.compile(r"Invalid (?:[Ff]eed )?[Ii]nput [Nn]ame:?\s*(\S+)"),
    re.compile(r"Tensor '?([^\s']+)'? .*external"),
)
# Where in its source ONNX Runtime stands: `/path/file.cc:12 ` and the name or the whole signature of a function.
_SOURCE = re.compile(
    r"(?:/\S*?/)?[\w.-]+\.(?:cc|h|hpp|cpp):\d+ "
    r"(?:[^()]{0,300}?::[^()]{0,300}\([^()]*\)(?: const)? |[^ ]+ )(?:\[[^\]]*\] )?"
)
_UNSUPPORTED = ("is not a registered function/op", "No Op registered for", "NOT_IMPLEMENTED", "Could not find an impl")
_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory", "MemoryError", "bad allocation")


def clean_message(error: BaseException) -> str:
    """ONNX Runtime's message in one line, without its error prefix and without paths of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"Load model from \S+ failed:\s*", "", text)
    text = _SOURCE.sub("", text)
    text = re.sub(r"(?<![\w:])/(?:[\w.+-]+/)+", "", text)
    return text[:800]


def where_of(message: str) -> dict[str, str]:
    """Node, op and tensor names that the message gives, under the keys `node`, `op`, `tensor`."""
    found: dict[str, str] = {}
    for pattern in _NODE_PATTERNS:
        if match := pattern.search(message):
            groups = match.groupdict()
            found["op"] = groups["op"]
            if node := groups.get("node"):
                found["node"] = node
            break
    for pattern in _TENSOR_PATTERNS:
        if match := pattern.search(message):
            found["tensor"] = match.group(1)
            break
    return found


def runtime_failure(code: str, error: BaseException, *, remedy: str | None = None) -> StageFailure:
    """The typed failure for what ONNX Runtime raised.

    `code` is the general one; `unsupported_op` and `out_of_memory` (never cached) are told apart by the message.
    """
    message = clean_message(error)
    where = where_of(message)
    if isinstance(error, MemoryError) or any(sign in message for sign in _OUT_OF_MEMORY):
        return StageFailure(
            "out_of_memory",
            f"ONNX Runtime had not enough memory: {message}",
            node=where.get("node"),
            remedy="Use smaller shapes or batch sizes, or a worker with more memory.",
            cacheable=False,
        )
    if any(sign in message for sign in _UNSUPPORTED):
        return StageFailure(
            "unsupported_op",
            f"ONNX Runtime has no kernel for op {where.get('op', '(unnamed)')}: {message}",
            node=where.get("node"),
            remedy="Export the model with standard ONNX operators only.",
        )
    remedy = remedy or "Check that the model runs in ONNX Runtime on its own; repair it or export it again."
    return StageFailure(code, message, node=where.get("node"), tensor=where.get("tensor"), remedy=remedy)


def is_plain_tensor(onnx_type: str) -> bool:
    """Whether ONNX Runtime's type string names a tensor of numbers or booleans, e.g. `tensor(float)`."""
    return onnx_type.startswith("tensor(") and onnx_type != "tensor(string)"


def dtype_of(onnx_type: str) -> str:
    """`tensor(float)` → `float32`, numpy's name; types that are no tensors stay as they are."""
    names = {"float": "float32", "double": "float64"}
    match = re.fullmatch(r"tensor\((\w+)\)", onnx_type)
    return names.get(match.group(1), match.group(1)) if match else onnx_type


def shape_of(name: str, shape: Iterable[Any] | None) -> tuple[int | str, ...]:
    """ONNX Runtime's shape with a name for every dimension it does not know."""
    return tuple(
        dim if isinstance(dim, int) or (isinstance(dim, str) and dim) else f"{name}_dim_{axis}"
        for axis, dim in enumerate(shape or ())
    )
