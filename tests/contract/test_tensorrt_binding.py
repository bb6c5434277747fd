"""The TensorRT backend against the real binding's API: every name that the sources use exists, the stand-in promises
nothing that the binding has not, and mypy checks the calls against the binding's own signatures."""

from __future__ import annotations

import ast
import atexit
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from pathlib import Path

import pytest

from tests.contract import make_tensorrt_typings as typings
from tests.factories import tensorrt_standin
from workers.backends.tensorrt.script import infer_script

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "workers" / "backends" / "tensorrt").glob("*.py"))
_CALLBACKS = {"reallocate_output", "reallocate_output_async", "notify_shape"}  # overridden, not part of the surface


@dataclass
class Class:
    bases: list[str]
    members: dict[str, list[list[str]]] = field(default_factory=dict)  # method → parameter names by overload
    attributes: set[str] = field(default_factory=set)
    classes: dict[str, Class] = field(default_factory=dict)


@cache
def made() -> tuple[Path | None, str]:
    """A folder for MYPYPATH with the typings of the real binding, or why it cannot be had. The binding is proprietary:
    what is made of it stays in a scratch folder."""
    folder = Path(tempfile.mkdtemp(prefix="typings-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        text = typings.make(folder / "work")
    except typings.Unavailable as reason:
        return None, str(reason)
    target = folder / "typings" / "tensorrt" / "__init__.pyi"
    target.parent.mkdir(parents=True)
    target.write_text(text)
    return folder / "typings", text


@pytest.fixture(autouse=True)
def typed() -> Path:
    folder, text = made()
    if folder is None:
        pytest.skip(f"the real binding cannot be had here: {text}")
    return folder


@cache
def api() -> tuple[dict[str, Class], set[str]]:
    """Classes, and the other names, of the real binding's typings."""
    tree = ast.parse(made()[1])
    classes = {n.name: _class(n) for n in tree.body if isinstance(n, ast.ClassDef)}
    others = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    others |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return classes, others


def _class(node: ast.ClassDef) -> Class:
    found = Class([b.id for b in node.bases if isinstance(b, ast.Name)])
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            if any(isinstance(d, ast.Name) and d.id == "property" for d in part.decorator_list):
                found.attributes.add(part.name)
            else:
                found.members.setdefault(part.name, []).append([a.arg for a in part.args.args if a.arg != "self"])
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.attributes.add(part.target.id)
        elif isinstance(part, ast.ClassDef):
            found.classes[part.name] = _class(part)
    return found


def _has(path: list[str]) -> bool:
    classes, others = api()
    if len(path) == 1 and path[0] in others:
        return True
    scope: Class | None = classes.get(path[0])
    for name in path[1:]:
        if scope is None:
            return False
        if name in scope.classes:
            scope = scope.classes[name]
        else:
            return name in scope.members or name in scope.attributes or any(_has([b, name]) for b in scope.bases)
    return scope is not None


def _chains(source: str) -> Iterator[tuple[int, list[str]]]:
    """Every `trt.A.B` (and `tensorrt.A.B` in annotations) of a module."""
    tree = ast.parse(source)
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            path, base = [], node
            while isinstance(base, ast.Attribute):
                path.append(base.attr)
                base = base.value  # type: ignore[assignment]
            if isinstance(base, ast.Name) and base.id in ("trt", "tensorrt"):
                yield node.lineno, path[::-1]


def _subclasses(source: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "trt":
                    yield base.attr, node


def _sources() -> list[tuple[str, str]]:
    return [(p.name, p.read_text()) for p in SOURCES] + [("infer.py", infer_script({}, "11"))]


def test_every_name_used_exists() -> None:
    chains = [(name, line, path) for name, text in _sources() for line, path in _chains(text)]
    assert len(chains) > 60, "the sources were found and read"
    missing = [f"{name}:{line} {'.'.join(path)}" for name, line, path in chains if not _has(path)]
    assert not missing


def test_the_script_calls_what_the_binding_has() -> None:
    """`self.engine.X` and `self.context.X` of the bundle's script, which has no annotations for mypy to check."""
    owners = {"engine": api()[0]["ICudaEngine"], "context": api()[0]["IExecutionContext"]}
    seen = set()
    for node in ast.walk(ast.parse(infer_script({}, "11"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr in owners:
            owner = owners[node.value.attr]
            assert node.attr in owner.members or node.attr in owner.attributes, node.attr
            seen.add(node.attr)
    assert len(seen) >= 14


def test_the_check_finds_what_tensorrt_11_has_not() -> None:
    for gone in ("BuilderFlag.FP16", "IInt8Calibrator", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "Nonsense"):
        assert not _has(gone.split("."))
    for there in ("BuilderFlag.TF32", "ILogger.Severity.ERROR", "Logger.WARNING", "__version__", "nptype"):
        assert _has(there.split("."))


def test_overridden_methods_have_the_bindings_parameters() -> None:
    classes, _ = api()
    seen = 0
    for _, text in _sources():
        for base, node in _subclasses(text):
            for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
                if method.name == "__init__" or method.name in _CALLBACKS:
                    continue
                parameters = [a.arg for a in method.args.args[1:]]
                assert parameters in classes[base].members[method.name], f"{base}.{method.name}"
                seen += 1
            init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
            called = ast.unparse(init.body[0])
            assert called == f"trt.{base}.__init__(self)", "pybind11 needs the base's own constructor"
    assert seen >= 5


def _surface(standin: type, real: Class, where: str) -> Iterator[str]:
    """What the stand-in's class has beyond the real one."""
    for name, value in vars(standin).items():
        if name.startswith("_") and name != "__init__":
            continue
        if inspect.isclass(value) and not issubclass(standin, IntEnum):
            yield from _surface(value, real.classes[name], f"{where}.{name}")
        elif inspect.isfunction(value):
            parameters = [p for p in inspect.signature(value).parameters if p != "self"]
            if name == "__init__":
                continue  # TensorRT's own objects are made by factories
            accepted = [o[: len(parameters)] for o in real.members.get(name, [])]
            if parameters not in accepted:
                yield f"{where}.{name}({', '.join(parameters)})"
        elif name not in real.attributes and name not in real.members and not _has([*real.bases[:1], name]):
            yield f"{where}.{name}"


def test_the_stand_in_has_nothing_that_the_binding_has_not() -> None:
    classes, _ = api()
    checked = 0
    for name, value in vars(tensorrt_standin).items():
        if not inspect.isclass(value) or value.__module__ != tensorrt_standin.__name__ or name == "Behaviour":
            continue
        assert name in classes, f"{name} is no class of TensorRT"
        if issubclass(value, IntEnum):
            assert set(value.__members__) <= classes[name].attributes
        extra = list(_surface(value, classes[name], name))
        assert not extra
        checked += 1
    assert checked >= 25


def test_the_calls_fit_the_bindings_signatures(tmp_path: Path, typed: Path) -> None:
    """mypy, strict, with the typings; and that it would say so: a wrong call in the same place is an error."""

    def run(*paths: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *map(str, paths)]
        environment = {**os.environ, "MYPYPATH": str(typed)}
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)

    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import tensorrt as trt\n\n\n"
        "def build(builder: trt.Builder, config: trt.IBuilderConfig) -> bytes:\n"
        "    config.set_flag(trt.BuilderFlag.FP16)\n"
        "    return bytes(builder.build_serialized_network(config))\n"
    )
    done = run(*SOURCES, wrong)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert errors, done.stdout + done.stderr
    assert all("wrong.py" in line for line in errors), done.stdout
    assert any("FP16" in line for line in errors)
    assert any("call-overload" in line for line in errors)
