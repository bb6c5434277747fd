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


@pytest.mark.parametrize("path", _sources("devices", "backends"), ids=lambda p: str(p.relative_to(WORKERS)))
def test_only_devices_know_which_device_it_is(path: Path) -> None:
    asked = [(line, text) for line, text in _compared(ast.parse(path.read_text())) if text in DEVICES]
    assert not asked, f"ask workers.devices instead: {asked}"


@pytest.mark.parametrize("path", _sources("backends"), ids=lambda p: str(p.relative_to(WORKERS)))
def test_nobody_asks_a_stage_s_or_a_backend_s_name(path: Path) -> None:
    names = {*kernel.stages(), *kernel.backends()}
    asked = [(line, text) for line, text in _compared(ast.parse(path.read_text())) if text in names]
    assert not asked, f"what a stage or a backend is stands on it: {asked}"


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
