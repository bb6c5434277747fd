"""The structure of `workers/` that import-linter cannot see: nothing asks by name what a thing is, and nothing private
crosses a package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers import kernel

WORKERS = Path(__file__).parents[2] / "workers"
DEVICES = {"cpu", "cuda", "gpu"}
PRECISIONS = {"fp32", "fp16", "bf16", "int8", "fp8", "int4"}
DISTRIBUTIONS = {"-gpu"}  # `onnxruntime-gpu` in the key of what no GPU has a part in
ENDINGS = (".onnx", ".data", ".onnx.data", ".xml", ".bin", ".pt2", ".plan")


def _sources(*without: str) -> list[Path]:
    found = sorted(WORKERS.rglob("*.py"))
    return [p for p in found if not any(p.is_relative_to(WORKERS / folder) for folder in without)]


def _compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that something is compared with, or looked for in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                items = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
                yield from (
                    (node.lineno, i.value) for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)
                )


def _sniffed(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that something is asked to begin or end with, to hold, or to have as its suffix."""
    for node in ast.walk(tree):
        asks: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith", "removeprefix", "removesuffix"):
                asks = [e for a in node.args for e in (a.elts if isinstance(a, ast.Tuple) else [a])]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            asks = [node.left] if ast.unparse(node.comparators[0]).endswith(("name", "id", "backend", "stage")) else []
        elif isinstance(node, ast.Compare) and ".suffix" in ast.unparse(node):
            asks = node.comparators
        yield from ((node.lineno, a.value) for a in asks if isinstance(a, ast.Constant) and isinstance(a.value, str))


@pytest.mark.parametrize("path", _sources("devices", "backends"), ids=lambda p: str(p.relative_to(WORKERS)))
def test_only_devices_know_which_device_it_is(path: Path) -> None:
    asked = [(line, text) for line, text in _compared(ast.parse(path.read_text())) if text in DEVICES]
    assert not asked, f"ask workers.devices instead: {asked}"


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(WORKERS)))
def test_nobody_asks_a_stage_s_or_a_backend_s_name(path: Path) -> None:
    names = (
        {*kernel.backends()} if path.is_relative_to(WORKERS / "backends") else {*kernel.stages(), *kernel.backends()}
    )
    asked = [(line, text) for line, text in _compared(ast.parse(path.read_text())) if text in names]
    assert not asked, f"what a stage or a backend is stands on it: {asked}"


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(WORKERS)))
def test_nobody_asks_how_a_name_begins_or_ends_to_know_what_it_is(path: Path) -> None:
    """Of a stage, a backend, a candidate or a file of an artifact. An upload is an archive of whatever its sender
    called it: there a name is all that there is (`stages/export`)."""
    names = {*kernel.stages(), *kernel.backends(), *DEVICES, *PRECISIONS}
    endings = () if path.is_relative_to(WORKERS / "stages" / "export") else ENDINGS
    asked = [
        (line, text)
        for line, text in _sniffed(ast.parse(path.read_text()))
        if (text.strip("-_.") in names and text not in DISTRIBUTIONS) or text in endings
    ]
    assert not asked, f"say it where the name is given (a kind, a field): {asked}"


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(WORKERS)))
def test_private_modules_stay_in_their_package(path: Path) -> None:
    package = ".".join(("workers", *path.relative_to(WORKERS).parent.parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("workers"):
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names if _is_module(node.module, a.name))]
            for name in names:
                owner, _, last = name.rpartition(".")
                private = last.startswith("_") and not last.startswith("__")
                assert not private or owner == package, f"{path.name} imports {name}"


def _is_module(package: str, name: str) -> bool:
    folder = WORKERS.parent.joinpath(*package.split("."))
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
