"""Bundles as the stage `package` makes them, of small models, and their other kinds as the API sends them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onnx import ModelProto

from app.artifacts.ensembles import ensemble
from app.artifacts.kinds import BundleKind, Joined, rearranged
from tests.factories import onnx_models as models
from workers.hardware import describe
from workers.kernel import Reporter, StageContext, backends
from workers.measure.pieces import folder_digest
from workers.stages.package import Package, PackageOptions


class Notes(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


@dataclass(frozen=True)
class Made:
    """`bundle`: the stored .zip. `data`: of the stage."""

    bundle: Path
    data: Mapping[str, Any]

    def opened(self, start: int, length: int | None) -> BinaryIO:
        with self.bundle.open("rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(-1 if length is None else length))

    def archive(self, kind: BundleKind) -> bytes:
        with self.bundle.open("rb") as file:
            found = rearranged(file, kind)
        return Joined(found.pieces, [self.opened]).read()

    def unpacked(self, kind: BundleKind, folder: Path) -> Path:
        folder.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(self.archive(kind))) as archive:
            archive.extractall(folder, filter="data")
        return folder

    def arrays(self, name: str) -> dict[str, Any]:
        """Of `sample_input.npz` or `expected_output.npz`."""
        import numpy as np

        with zipfile.ZipFile(self.bundle) as archive, np.load(io.BytesIO(archive.read(name))) as arrays:
            return {key: arrays[key] for key in arrays.files}


def chained(first: Made, second: Made, folder: Path, connect: Sequence[str] = ()) -> str:
    """The repository of both and their ensemble, as the API sends it, unpacked into a new folder; the ensemble's
    name."""
    with first.bundle.open("rb") as one, second.bundle.open("rb") as other:
        found = ensemble(one, other, connect)
    folder.mkdir(parents=True)
    sent = Joined(found.joined.pieces, [first.opened, second.opened]).read()
    with tarfile.open(fileobj=io.BytesIO(sent)) as archive:
        archive.extractall(folder, filter="data")
    return found.name


def bundled(
    backend: str,
    model: ModelProto,
    folder: Path,
    *,
    runtime: Mapping[str, Any] | None = None,
    isa: tuple[str, ...] = (),
    tritonserver: Path | None = None,
    name: str = "m-fp32",
    **manifest: Any,
) -> Made:
    """`isa`: of the machine that the engine counts as measured on; `runtime`: build options."""
    made, engine = backends()[backend](), folder / "engine"
    engine.mkdir(parents=True)
    built = made.build(models.folder(model, folder / "model"), engine, dict(runtime or {}), Notes())
    return packaged(
        backend, engine, built["runtime"], folder, isa=isa, tritonserver=tritonserver, name=name, **manifest
    )


def packaged(
    backend: str,
    engine: Path,
    runtime: Mapping[str, Any],
    folder: Path,
    *,
    isa: tuple[str, ...] = (),
    tritonserver: Path | None = None,
    name: str = "m-fp32",
    **manifest: Any,
) -> Made:
    """Of an engine that is built, and loaded with `runtime`."""
    (folder / "work").mkdir()
    hardware = {**describe(), "isa": list(isa)}
    context = StageContext({"engine": engine}, folder / "work", folder / "out", Notes(), hardware)
    told = {"job": {"id": "job_1"}, "engine": {"precision": "fp32"}, **manifest}
    options = PackageOptions(
        name=name,
        backend=backend,
        runtime=dict(runtime),
        engine_format="onnx",
        manifest=told,
        engine_digest=folder_digest(engine),
        tritonserver=None if tritonserver is None else str(tritonserver),
    )
    data = dict(Package().run(context, options).data)
    return Made(folder / "out/bundle" / data["bundle_file"], data)
