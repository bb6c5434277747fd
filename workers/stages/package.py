"""package: the engine as one file, and the bundle: everything needed to run it, in one archive.

Both archives are deterministic (sorted names, fixed times): the same engine gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.artifacts.kinds import KINDS_FILE, index_of
from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.failures import StageFailure, infrastructure_failure
from workers import kernel
from workers.artifacts import names_in
from workers.bundle_readme import readme
from workers.candidates import Member
from workers.data import Samples, synthetic_feeds
from workers.graph.onnx_files import link_or_copy
from workers.kernel import Session, Stage, StageContext, StageOptions, StageResult
from workers.libraries import installed_version
from workers.measure.axes import fixed_batch, follows_batch
from workers.measure.method import versions
from workers.members import names_of, scripts_of
from workers.serving.bundles import Bundled, other_kinds
from workers.serving.defaults import settings_of
from workers.serving.python import requirements, serving_files, tried, why_apart

if TYPE_CHECKING:
    from workers.kernel import Arrays
    from workers.serving.serving_settings import Settings

_EPOCH = (1980, 1, 1, 0, 0, 0)
_BUFFER = 4 << 20
_SAME = 1e-4  # of an output's largest number: what another order of summing may move


class PackageOptions(StageOptions):
    """`name`: stem of the file names. `manifest` goes into the bundle: what it is, where it comes from, its figures.
    `tritonserver`: the server that Triton's model repository is tried in, or a script that starts it."""

    name: str
    backend: str
    runtime: dict[str, Any]
    engine_format: str
    manifest: dict[str, Any]
    engine_digest: str  # of the files that were judged: what ships is these and no others
    shapes: dict[str, Any] | None = None
    seed: int = 0
    tritonserver: str | None = None


class Package(Stage[PackageOptions]):
    """Inputs: engine, [data]. Outputs: engine (one file), bundle (one .zip).

    data: engine_file, bundle_file, files (in the bundle beside the engine's own), kinds (of the bundle beside `python`:
    {backend, notes}, or {reason} why there is none), not_repeatable (outputs that came out otherwise when the same
    input ran again: random ones, which the bundle does not compare), serving (`serving.json`), tried (`serving.proof`:
    the bundle was run as its user will; {reason} where that was not possible here).

    Raises StageFailure `packaged_engine_fails`, `bundle_fails`."""

    name = "package"
    version = 15
    Options = PackageOptions
    libraries = ("numpy",)
    hardware_bound = True  # the expected output is this machine's
    loopback = True

    def run(self, ctx: StageContext, options: PackageOptions) -> StageResult:
        engine = ctx.inputs["engine"]
        single = _single_file(engine, ctx.output("engine"), options)
        ctx.reporter.progress(0.3, "engine file")
        backend = kernel.backends()[options.backend]()
        session = backend.load(engine, options.runtime)
        try:
            samples, expected, random = _samples(ctx, session, options)
            batched = follows_batch(session, expected[""], _twice(session, samples[""]))
            settings = _settings(ctx, session, options, random)
        except StageFailure as failure:
            failure.code = "packaged_engine_fails"
            raise
        finally:
            session.close()
        ctx.reporter.progress(0.5, "bundle")
        bundle = ctx.output("bundle") / f"{options.name}-bundle.zip"
        extra = _texts(options, settings, samples, expected, random)
        bundled = Bundled(
            name=options.name,
            backend=backend,
            engine=engine,
            runtime=options.runtime,
            manifest=options.manifest,
            hardware=ctx.hardware,
            session=session,
            sample=samples[""],
            batched=batched,
            serving=settings.to_json(),
            texts=extra,
            versions=versions(names_of(options.backend, options.runtime)),
            expected={n: a for n, a in expected[""].items() if n not in random},
            further=[
                (samples[which], {n: a for n, a in at.items() if n not in random})
                for which, at in expected.items()
                if which
            ],
            tritonserver=None if options.tritonserver is None else Path(options.tritonserver),
            scratch=ctx.workspace,
        )
        kinds = other_kinds(bundled)
        extra |= kinds.texts
        _write_zip(bundle, engine, extra)
        _add_kinds(bundle, kinds.entries)
        _require_judged(options.engine_digest, bundle, names_in(engine))
        ctx.reporter.progress(0.7, "running the bundle")
        seen = tried(bundle, bundled, ctx.reporter)
        return StageResult(
            outputs=("engine", "bundle"),
            data={
                "engine_file": single.name,
                "bundle_file": bundle.name,
                "files": [*extra, KINDS_FILE],
                "kinds": {k: _told(entry) for k, entry in kinds.entries.items()},
                "not_repeatable": random,
                "serving": settings.to_json(),
                "tried": seen,
            },
        )


def _texts(
    options: PackageOptions,
    settings: Settings,
    samples: Mapping[str, Arrays],
    expected: Mapping[str, Arrays],
    random: Sequence[str],
) -> dict[str, bytes]:
    """What lies in the bundle beside the engine's own files."""
    manifest = {
        **options.manifest,
        "name": options.name,
        "not_repeatable": random,
        "serving": settings.to_json(),
    }
    outputs = {which: {n: a for n, a in at.items() if n not in random} for which, at in expected.items()}
    texts = {
        **serving_files(settings),
        **{name: text.encode() for name, text in scripts_of(options.backend, options.runtime).items()},
        **{f"sample_input{which}.npz": _npz(feeds) for which, feeds in samples.items()},
        **{f"expected_output{which}.npz": _npz(at) for which, at in outputs.items()},
        "README.md": readme(options.name, options.backend, manifest).encode(),
        "requirements.txt": _requirements(options).encode(),
    }
    manifest["files"] = sorted([*texts, "manifest.json"])
    texts["manifest.json"] = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False).encode()
    return texts


def _require_judged(digest: str, bundle: Path, names: Sequence[str]) -> None:
    """The engine's files as they lie in the bundle now, against those that were judged."""
    refs = []
    with zipfile.ZipFile(bundle) as archive:
        for name in sorted(names):
            with archive.open(name) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # reads only
            refs.append(FileRef(name, sha256, archive.getinfo(name).file_size))
    if ArtifactRef(tuple(refs)).digest != digest:
        raise infrastructure_failure(
            "engine_changed",
            "The engine's files are not those whose accuracy was judged.",
            stage="package",
            remedy="Submit again; if it comes back, look at the memory and the disk of the worker's machine.",
        )


def _single_file(engine: Path, out: Path, options: PackageOptions) -> Path:
    files = names_in(engine)
    if len(files) == 1:
        target = out / f"{options.name}{Path(files[0]).suffix}"
        link_or_copy(engine / files[0], target)
        return target
    target = out / f"{options.name}.tar"
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = (engine / name).stat().st_size, 0o644
            with (engine / name).open("rb") as source:
                archive.addfile(info, source)
    return target


def _samples(
    ctx: StageContext, session: Session, options: PackageOptions
) -> tuple[dict[str, Arrays], dict[str, Arrays], list[str]]:
    """What the bundle is tried with: inputs and outputs by what their files' names end with, a sample for each engine
    in it; and the outputs that came out otherwise when the same input ran again."""
    members = _members(options)
    further = zip(members[1:], _answers(options)[1:], strict=True)
    least = {f"_{member.folder}": smallest for member, (smallest, _) in further}
    sizes = {"": fixed_batch(session.inputs) or 1, **least}
    feeds = {which: _sample_feeds(ctx, session, options, batch) for which, batch in sizes.items()}
    expected = {which: session.run(given) for which, given in feeds.items()}
    again = {which: session.run(given) for which, given in feeds.items()}
    random = {n for which, at in expected.items() for n, array in at.items() if not _repeated(array, again[which][n])}
    return feeds, expected, sorted(random)


def _answers(options: PackageOptions) -> list[tuple[int, int | None]]:
    """The smallest and the largest batch that each engine answers: of several, one more than the one before it does."""
    members = _members(options)
    if not members:
        return [(1, None)]
    least = [1, *((before.most or 0) + 1 for before in members[:-1])]
    return [(smallest, member.most) for smallest, member in zip(least, members, strict=True)]


def _members(options: PackageOptions) -> list[Member]:
    """The engines that answer by themselves, where those are several."""
    members = kernel.backends()[options.backend].members(options.runtime)
    return [member for member in members if not member.link]


def _sample_feeds(ctx: StageContext, session: Session, options: PackageOptions, batch: int) -> Arrays:
    """One real sample where there is data, else a plausible random one; repeated to fill the batch."""
    if "data" in ctx.inputs:
        samples = Samples(ctx.only_file("data"), session.inputs, session.outputs, max_samples=1)
        return next(iter(samples.batches(1))).filled(batch)
    return synthetic_feeds(session.inputs, batch, options.shapes, options.seed)


def _twice(session: Session, feeds: Arrays) -> Arrays:
    """What comes out for two samples at once; nothing where the engine does not take them."""
    try:
        return session.run({name: np.concatenate([a, a]) if a.ndim else a for name, a in feeds.items()})
    except StageFailure:
        return {}


def _settings(ctx: StageContext, session: Session, options: PackageOptions, random: Sequence[str]) -> Settings:
    """How the engine is served; whether requests may share a batch was tried."""
    data = ctx.only_file("data") if "data" in ctx.inputs else None
    engines = _answers(options)
    why = why_apart(session, data, options.shapes, options.seed, _precision(options), random, engines)
    return settings_of(session.inputs, options.manifest, why)


def _precision(options: PackageOptions) -> str:
    return str((options.manifest.get("engine") or {}).get("precision", "fp32"))


def _repeated(first: Any, second: Any) -> bool:
    """Whether an output came out the same twice, but for another order of summing."""
    if first.shape != second.shape:
        return False
    if first.dtype.kind not in "fc":
        return bool(np.array_equal(first, second))
    a, b = first.astype(np.float64), second.astype(np.float64)
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=0.0, atol=_SAME * size, equal_nan=True))


def _npz(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(arrays[name], order="C"), allow_pickle=False)
            archive.writestr(_zip_info(f"{name}.npy", zipfile.ZIP_DEFLATED), member.getvalue())
    return buffer.getvalue()


def _zip_info(name: str, method: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = method
    info.external_attr = 0o644 << 16
    return info


def _write_zip(path: Path, engine: Path, extra: Mapping[str, bytes]) -> None:
    """Stored, not compressed: other kinds are made of its bytes as they lie there (`app.artifacts.kinds`)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in names_in(engine):
            with (
                (engine / name).open("rb") as source,
                archive.open(_zip_info(name, zipfile.ZIP_STORED), "w", force_zip64=True) as target,
            ):
                shutil.copyfileobj(source, target, _BUFFER)
        for name in sorted(extra):
            archive.writestr(_zip_info(name, zipfile.ZIP_STORED), extra[name])


def _told(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of a kind, for the report: without what only the API needs to make it of the bundle."""
    return {name: value for name, value in entry.items() if name not in ("files", "model")}


def _add_kinds(bundle: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Last, since it tells the digests of archives that are made of the other members."""
    with bundle.open("rb") as file:
        index = index_of(entries, file)
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.writestr(_zip_info(KINDS_FILE, zipfile.ZIP_STORED), index)


def _requirements(options: PackageOptions) -> str:
    """What `infer.py` and `serve.py` import and nothing else, in the versions that were measured; what is not installed
    here, without one."""
    names = names_of(options.backend, options.runtime)
    found: dict[str, str | None] = dict(versions(names))
    known = kernel.backends()
    found |= {library: installed_version(library) for name in names for library in known[name].script_libraries}
    found |= requirements()
    return "".join(f"{n}=={v}\n" if v else f"{n}\n" for n, v in sorted(found.items()))
