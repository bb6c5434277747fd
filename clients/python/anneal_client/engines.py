"""An engine in the caller's process: its bundle, unpacked once under its digest, and the `infer.py` in it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import stat
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from anneal_client.errors import EngineUnusable
from anneal_client.places import cache_folder
from anneal_client.transfer import sha256_of

_INDEX = ".anneal.json"  # of an unpacked bundle, written last: the SHA-256 of every file


class LocalEngine:
    """An engine that was loaded. `engine(inputs)` computes; `inputs` names them, `manifest` is the bundle's,
    `folder` where it lies. Threads may share it."""

    def __init__(self, folder: Path, module: ModuleType, threads: int | None) -> None:
        self.folder = folder
        self.manifest: Mapping[str, Any] = _json(folder / "manifest.json")
        self._module = module
        names, self._run = module.load() if threads is None else module.load(threads)
        self.inputs: tuple[str, ...] = tuple(names)

    def __call__(self, inputs: Any = None, /, **named: Any) -> dict[str, Any]:
        """The outputs by name, as numpy arrays. `inputs`: arrays (or tensors of torch) by name, or the one array of a
        model with one input; or as keywords. Raises `EngineUnusable` where one is missing or there is no such input;
        ValueError for a size that this engine was found not to answer right (the manifest's `accepts`)."""
        feeds = {name: _array(value) for name, value in self._named(inputs, named).items()}
        outputs: dict[str, Any] = self._run(feeds)
        return outputs

    def _named(self, inputs: Any, named: dict[str, Any]) -> dict[str, Any]:
        if inputs is None:
            given = named
        elif isinstance(inputs, Mapping):
            given = {**inputs, **named}
        elif len(self.inputs) == 1 and not named:
            given = {self.inputs[0]: inputs}
        else:
            detail = f"The model has the inputs {', '.join(self.inputs)}: give arrays by these names."
            raise EngineUnusable("inputs_unnamed", detail)
        missing = [name for name in self.inputs if name not in given]
        unknown = [name for name in given if name not in self.inputs]
        if missing or unknown:
            faults = [
                f"{', '.join(names)} {what}" for names, what in ((missing, "missing"), (unknown, "unknown")) if names
            ]
            remedy = f"Give {', '.join(self.inputs)}."
            raise EngineUnusable("wrong_inputs", f"Inputs: {'; '.join(faults)}.", remedy=remedy)
        return {name: given[name] for name in self.inputs}

    def sample(self) -> dict[str, Any]:
        """The sample input of the bundle."""
        arrays: dict[str, Any] = self._module.read(self.folder / "sample_input.npz")
        return {name: arrays[name] for name in self.inputs}

    def check(self) -> bool:
        """Whether it answers the bundle's sample here as it did where it was built, as far as its precision carries."""
        outputs, told = self(self.sample()), io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):  # it is written as a program
            return bool(self._module.as_expected(outputs))

    def __repr__(self) -> str:
        engine = self.manifest.get("engine") or {}
        return f"<engine {engine.get('backend', '')} {engine.get('precision', '')}: {', '.join(self.inputs)}>"


def load_bundle(path: str | Path, *, threads: int | None = None) -> LocalEngine:
    """The engine of a bundle (kind `python`): the .zip, or the folder it was unpacked into. It runs the bundle's
    `infer.py` in this process, so load only bundles of a service that you trust. `threads`: that compute, where it is
    not as many as were measured. Raises `EngineUnusable`."""
    folder = Path(path)
    if not folder.is_dir():
        archive, folder = folder, folder_of(sha256_of(folder))
        if not is_whole(folder):
            unpack(archive, folder)
    script = folder / "infer.py"
    if not script.is_file():
        remedy = "Take the bundle of kind `python` (the default), not the one for Triton or KServe."
        raise EngineUnusable("no_infer_script", f"There is no infer.py in {folder}.", remedy=remedy)
    try:
        return LocalEngine(folder, _module(script), threads)
    except ImportError as missing:
        raise EngineUnusable(
            "engine_library_missing",
            f"The engine needs {missing.name or missing}, which this environment has not.",
            remedy=f"{sys.executable} -m pip install -r {folder / 'requirements.txt'}",
        ) from missing
    except Exception as broken:  # whatever the engine's library raises
        engine = _json(folder / "manifest.json").get("engine") or {}
        raise EngineUnusable(
            "engine_not_loaded",
            f"{type(broken).__name__}: {broken}",
            remedy=f"It was built for {engine.get('backend', 'another library')} on the hardware in its manifest.json; "
            f"requirements.txt beside it has the versions.",
        ) from broken


def _module(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"anneal_engine_{script.parent.name[:16]}", script)
    if spec is None or spec.loader is None:
        raise EngineUnusable("no_infer_script", f"{script} cannot be read.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder_of(sha256: str) -> Path:
    """Where the bundle with this digest is kept unpacked."""
    return cache_folder() / "engines" / sha256


def is_whole(folder: Path) -> bool:
    """Whether a bundle lies there as it was unpacked: every file, with the digest that it had."""
    index = folder / _INDEX
    if not index.is_file():
        return False
    try:
        return all(sha256_of(folder / name) == sha256 for name, sha256 in _json(index).items())
    except OSError:
        return False


def unpack(archive: Path, folder: Path) -> None:
    """The bundle's files into `folder`, which appears when they are all there; what lay there goes. Two processes may
    do it at once. Raises `EngineUnusable`."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        made = Path(scratch, "bundle")
        made.mkdir(mode=0o700)
        try:
            with zipfile.ZipFile(archive) as packed:
                names = [_checked(info) for info in packed.infolist() if not info.is_dir()]
                packed.extractall(made, names)
        except zipfile.BadZipFile as broken:
            raise EngineUnusable("invalid_bundle", f"{archive.name} is no bundle: {broken}.") from broken
        digests = {name: sha256_of(made / name) for name in names}
        (made / _INDEX).write_text(json.dumps(digests), encoding="utf-8")
        old = Path(scratch, "old")
        try:
            if folder.exists():
                folder.rename(old)
            made.rename(folder)
        except OSError:  # another process was quicker
            if not is_whole(folder):
                raise


def _checked(info: zipfile.ZipInfo) -> str:
    path = PurePosixPath(info.filename)
    link = stat.S_ISLNK(info.external_attr >> 16)
    if link or path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
        raise EngineUnusable("invalid_bundle", f"The bundle holds {info.filename!r}, which leaves its folder.")
    return info.filename


def _array(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "detach"):  # a tensor of torch, wherever it lies
        value = value.detach().cpu()
    return np.asarray(value)


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if isinstance(found, dict) else {}
