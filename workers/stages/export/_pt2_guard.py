"""Makes a `.pt2` archive safe to give to `torch.export.load`, which must never see an untrusted one.

What that function would execute, as of torch 2.13:

- pickles, with `weights_only=False` as it is or as a fallback: `data/sample_inputs/*.pt`, weights and constants that
  are marked `use_pickle`, `custom_obj_*`, `opaque_obj_*`, and the legacy `data/weights/*.pt`, `data/constants/*.pt`;
- compiled libraries below `data/aotinductor/`;
- symbolic expressions (`expr_str`), which `sympy.sympify` evaluates as Python;
- call targets, looked up by attribute in `torch`, `operator` and `math`: any function of theirs;
- names, which are pasted into the source of the generated `forward`; and `guards_code`, which is source.

So a new archive is written that holds plain tensors and one graph of known operators, with checked names and
expressions. Sample inputs, node metadata and extra files are left out; for anything else there is a refusal.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.archives import Archive, Limits, open_archive
from app.domain.failures import StageFailure, model_failure
from app.errors import AppError
from workers.stages.export._source import as_failure

_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_CODE_PREFIXES = ("data/aotinductor/", "data/constants/custom_obj", "data/constants/opaque_obj", "mtia/", "executorch/")
_PLAIN = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/[\w.]+|data/(weights/weight|constants/tensor)_\d+)"
)
_DROPPED = re.compile(r"(extra/.*|\.format_version|\.storage_alignment)")
_GRAPH_LIMIT_BYTES = 256 << 20

_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|higher_order)\.\w+(\.\w+)?"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|getitem|and_|or_|not_|xor|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt|log2|log|exp|pow)"
    r"|torch\.(sym_\w+|_sym_\w+)"
)
_FILE_OPS = re.compile(r"torch\.ops\.aten\.(from_file|_from_file|save|load)\b")
_NAME = re.compile(r"[A-Za-z_]\w*|")
_SPEC_TEXT = re.compile(r"[\w.\-\[\]\", :{}\\]*")
_SYMPY_CALLS = re.compile(
    "Symbol|Integer|Float|Rational|Mod|Max|Min|Abs|Pow|Add|Mul|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Piecewise|ceiling|floor|sqrt"
    "|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat"
    "|Identity|BitwiseFn_bitwise_and|BitwiseFn_bitwise_or"
)
_SYMPY_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop, ast.Tuple,
)  # fmt: skip


def clean_copy(source: Path, target: Path, sample_inputs: bytes) -> None:
    """Write a safe copy of the archive `source` to `target`, with these bytes in place of its sample inputs.

    Raises StageFailure `unsafe_program` for what would run code, `invalid_model` for what is no such archive.
    """
    size = source.stat().st_size
    # Weights are stored, not compressed: the copy cannot be larger than what came.
    limits = Limits(max_bytes=size + _GRAPH_LIMIT_BYTES, max_members=200_000, max_ratio=100.0)
    try:
        with open_archive(source, limits) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
            _copy(archive, out, sample_inputs)
    except AppError as error:
        failure = as_failure(error)
        if failure.code == "archive_invalid":
            failure.code = "invalid_model"
            failure.remedy = "Save the program with torch.export.save(program, 'model.pt2')."
        raise failure from None


def _copy(archive: Archive, out: zipfile.ZipFile, sample_inputs: bytes) -> None:
    names = [m.name for m in archive.members]
    roots = {n.split("/", 1)[0] for n in names if "/" in n}
    root = next((r for r in roots if f"{r}/{_GRAPH}" in names), None)
    if root is None or any(not n.startswith(f"{root}/") for n in names):
        raise _not_pt2(names)
    for member in archive.members:
        name = member.name[len(root) + 1 :]
        if name == _GRAPH or name in _CONFIGS:
            if member.size > _GRAPH_LIMIT_BYTES:
                raise model_failure("invalid_model", f"{name} has {member.size} bytes.")
            text = json.dumps(_checked_json(name, _read(archive, member.name)))
            out.writestr(zipfile.ZipInfo(member.name), text)
        elif name == _SAMPLES:
            out.writestr(zipfile.ZipInfo(member.name), sample_inputs)
        elif _PLAIN.fullmatch(name):
            stream = archive.verified(member.name)
            with out.open(zipfile.ZipInfo(member.name), "w", force_zip64=True) as copy:
                while block := stream.read(4 << 20):
                    copy.write(block)
        elif not _DROPPED.fullmatch(name):
            code = name.startswith(_CODE_PREFIXES) or name.endswith((".pt", ".so", ".py"))
            raise _unsafe(f"holds {name!r}, {'which is code or a pickle' if code else 'which is no part of a program'}")


def _not_pt2(names: list[str]) -> StageFailure:
    scripted = any(n.endswith(("/constants.pkl", "/data.pkl")) for n in names)
    what = "a pickled checkpoint or TorchScript, which is never loaded" if scripted else "not made by torch.export.save"
    return model_failure(
        "invalid_model",
        f"The file is {what}.",
        remedy="Save it as torch.export.save(torch.export.export(model.eval(), (example,)), 'model.pt2').",
    )


def _unsafe(what: str) -> StageFailure:
    return model_failure(
        "unsafe_program",
        f"The .pt2 archive {what}; such content is refused because loading it could run code.",
        remedy="Export a model of plain tensors and standard ATen operators with a current torch, or upload ONNX.",
    )


def _read(archive: Archive, name: str) -> bytes:
    stream = archive.verified(name)
    return b"".join(iter(lambda: stream.read(1 << 20), b""))


def _checked_json(name: str, data: bytes) -> Any:
    try:
        content = json.loads(data)
        if name == _GRAPH:
            return _checked_program(content)
        for entry in content["config"].values():
            file = str(entry["path_name"])
            if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", file):
                raise _unsafe(f"stores {file!r} as a pickle or object")
    except StageFailure:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"{name} in the .pt2 archive cannot be read ({type(error).__name__})."
        raise model_failure("invalid_model", detail) from None
    return content


def _checked_program(program: dict[str, Any]) -> dict[str, Any]:
    program["guards_code"] = []
    module = program["graph_module"]
    module["metadata"] = {}
    for symbol in program["range_constraints"]:
        _check_name(symbol)
    for entry in module["module_call_graph"]:
        if signature := entry.get("signature"):
            for name in signature.get("forward_arg_names") or ():
                _check_name(name)
            for spec in (signature["in_spec"], signature["out_spec"]):
                if not _SPEC_TEXT.fullmatch(spec):
                    raise _unsafe("has an unusual input structure")
    for key, value, owner in _walk(program):
        if key == "metadata" and "target" in owner:
            owner["metadata"] = {}
        elif key in ("target", "as_operator"):
            if not _TARGET.fullmatch(value) or _FILE_OPS.match(value):
                raise _unsafe(f"calls {str(value)[:100]!r}, which is no standard operator")
        elif key == "expr_str":
            _check_expression(value)
        elif key in ("name", "graph_name", "as_name", "class_fqn"):
            _check_name(value)
        elif key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
            for name in value:
                _check_name(name)
        elif key in ("as_custom_obj", "custom_obj_values", "custom_obj") and value:
            raise _unsafe("holds a custom object")
    return program


def _walk(value: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every (key, value, object) in the JSON; node metadata, which is dropped, is not entered."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, inner in list(item.items()):
                yield key, inner, item
                if key != "metadata":
                    stack.append(inner)
        elif isinstance(item, list):
            stack.extend(item)


def _check_name(name: Any) -> None:
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise _unsafe(f"has the name {str(name)[:60]!r}, which is no identifier")


def _check_expression(text: Any) -> None:
    """An arithmetic expression over symbols and sympy's own functions, and nothing else."""
    try:
        tree = ast.parse(str(text)[:10_000], mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unsafe(f"has the symbolic expression {str(text)[:60]!r}") from None
    for node in ast.walk(tree):
        ok = isinstance(node, _SYMPY_NODES)
        if isinstance(node, ast.Call):
            ok = isinstance(node.func, ast.Name) and bool(_SYMPY_CALLS.fullmatch(node.func.id))
        elif isinstance(node, ast.Name):
            ok = "__" not in node.id
        elif isinstance(node, ast.Constant):
            ok = not isinstance(node.value, str) or bool(_NAME.fullmatch(node.value))
        if not ok:
            raise _unsafe(f"has the symbolic expression {str(text)[:60]!r}")
