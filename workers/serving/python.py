"""The bundle's own kind: what `infer.py` and `serve.py` need beside the engine, and its trial before it ships."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.data import Samples, synthetic_feeds
from workers.graph.onnx_files import link_or_copy
from workers.kernel import Backend, Reporter, Session
from workers.libraries import installed_version
from workers.measure.axes import batch_axes
from workers.rounding import TOLERANCES
from workers.serving import LIBRARIES, SHIPPED, image, shipped
from workers.serving.bundles import Bundled
from workers.serving.defaults import why_one_by_one
from workers.serving.probe import depends_on_batch
from workers.serving.proof import run_bundle
from workers.serving.serving_settings import FILE, Settings

if TYPE_CHECKING:
    from workers.kernel import Arrays

FILES = (*SHIPPED, FILE, image.NAME)
_SAMPLES = 8  # among which two of one shape are looked for
_LARGE_BYTES = 256 << 20  # an engine that is not loaded twice at once


def serving_files(settings: Settings) -> dict[str, bytes]:
    """`FILES`: the server, how it serves this engine, and its Dockerfile."""
    told = json.dumps(settings.to_json(), indent=2, sort_keys=True) + "\n"
    return {**shipped(), FILE: told.encode(), image.NAME: image.dockerfile().encode()}


def requirements() -> dict[str, str | None]:
    """What the server imports, and the versions that it was tried with here."""
    return {name: installed_version(name) for name in LIBRARIES}


def why_apart(
    session: Session,
    data: Path | None,
    shapes: Mapping[str, Any] | None,
    seed: int,
    precision: str,
    random: Collection[str],
    engines: Sequence[tuple[int, int | None]],
) -> str | None:
    """Why requests to this engine cannot share a batch, in words: what its inputs tell, or what came out for real
    samples (synthetic ones without `data`) together. None where they can. `engines`: see `depends_on_batch`. Raises
    what the session does."""
    why = why_one_by_one(session.inputs)
    if why is not None:
        return why
    batched = [name for name, axis in batch_axes(session.inputs).items() if axis == 0]
    samples = _unlike(session, data) or [synthetic_feeds(session.inputs, 1, shapes, seed + i) for i in range(2)]
    for name in session.inputs:
        if name.name not in batched:  # the same for all of them
            samples[1] = {**samples[1], name.name: samples[0][name.name]}
    return depends_on_batch(session.run, samples, batched, allowed(precision), random, engines)


def _unlike(session: Session, data: Path | None) -> list[Arrays]:
    """Two samples of one shape, where there are such."""
    if data is None:
        return []
    samples = Samples(data, session.inputs, session.outputs, max_samples=_SAMPLES)
    seen: dict[Any, Arrays] = {}
    for batch in samples.batches(1):
        feeds = batch.filled(1)
        shape = tuple((n, a.shape) for n, a in sorted(feeds.items()))
        if shape in seen and any((feeds[n] != a).any() for n, a in seen[shape].items()):
            return [seen[shape], feeds]
        seen.setdefault(shape, feeds)
    return []


def allowed(precision: str) -> float:
    """How far a number may be off, over the largest of its output; of several engines' precisions, the lowest one's."""
    return max(TOLERANCES.get(part, TOLERANCES["fp32"]) for part in precision.split("+"))


def tried(bundle: Path, bundled: Bundled, reporter: Reporter) -> dict[str, Any]:
    """The bundle, unpacked and run as its user will (`proof.run_bundle`): what was seen, or {reason} where this machine
    lacks a library that it needs. The engine's files are linked, not unpacked: they were compared. Raises StageFailure
    `bundle_fails`."""
    assert bundled.scratch is not None
    engine, folder = bundled.engine, bundled.scratch / "bundle"
    folder.mkdir(parents=True, exist_ok=True)
    files = [p for p in engine.rglob("*") if p.is_file()]
    own = {p.relative_to(engine).as_posix() for p in files}
    with zipfile.ZipFile(bundle) as archive:
        for member in archive.namelist():
            if member not in own:
                archive.extract(member, folder)
    lacking = _lacking((folder / "requirements.txt").read_text(encoding="utf-8"))
    if lacking:
        reporter.note(
            "The bundle was not run here as its user will: this machine lacks what it needs.", lacking=lacking
        )
        return {"reason": f"this machine lacks {', '.join(lacking)}"}
    for path in files:
        target = folder / path.relative_to(engine)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, target)
    small = sum(p.stat().st_size for p in files) <= _LARGE_BYTES
    at_once = small and bundled.backend.device == Backend.device
    precision = str((bundled.manifest.get("engine") or {}).get("precision", "fp32"))
    examples = [(bundled.sample, bundled.expected), *bundled.further]
    hurry = bundled.backend.script_hurry
    return run_bundle(folder, bundled.name, examples, allowed(precision), at_once=at_once, arguments=hurry)


def _lacking(text: str) -> list[str]:
    """Of the distributions that `requirements.txt` names, those that are not installed."""
    names: Sequence[str] = [m[0] for line in text.splitlines() if (m := re.match(r"[A-Za-z0-9._-]+", line))]
    return [name for name in names if installed_version(name) is None]
