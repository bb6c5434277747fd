"""What a bundle holds for other servers: texts beside its own files, and which of all these make up each kind
(`app.artifacts.kinds`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workers import devices, kernel
from workers.artifacts import names_in
from workers.bundle_readme import machine_of
from workers.graph.onnx_files import link_or_copy
from workers.kernel import Backend, Session, TensorSpec
from workers.members import scripts_of
from workers.serving import ensemble, kserve, triton
from workers.serving.launching import SERVER
from workers.serving.native import Instances, InTriton
from workers.serving.triton_server import Example, NotLoaded, replayed, running

if TYPE_CHECKING:
    from workers.kernel import Arrays

_MANIFEST = "manifest.json"  # which infer.py asks for the sizes that it takes
_READY_S = 120.0


@dataclass(frozen=True)
class Bundled:
    """`name`, `backend`, `runtime`, `manifest`: as the stage `package` has them. `texts`: the bundle's own files beside
    the engine's. `batched`: whether every tensor follows the batch on its first axis
    (`follows_batch`). `serving`: `serving.json`. `expected`: what comes out for `sample`, of what comes out alike each
    time; `further`: such a pair for each further engine. `tritonserver`: the one that the repository is tried in, which
    takes `scratch`, an empty folder."""

    name: str
    backend: Backend
    engine: Path
    runtime: Mapping[str, Any]
    manifest: Mapping[str, Any]
    hardware: Mapping[str, Any]
    session: Session
    sample: Arrays
    batched: bool
    serving: Mapping[str, Any]
    texts: Mapping[str, bytes]
    versions: Mapping[str, str]
    expected: Arrays = field(default_factory=dict)
    further: Sequence[tuple[Arrays, Arrays]] = ()
    tritonserver: Path | None = None
    scratch: Path | None = None


@dataclass
class Kinds:
    """`texts`: further members of the bundle. `entries`: of each kind, {"files": path in it → member} or {"reason"}."""

    texts: dict[str, bytes] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)


_OVER_HTTP, _IN_PROCESS = "over HTTP", "in the batcher's own process, which HTTP comes on top of,"
_SCALARS = "Triton has no tensors without an axis where there is no batch, and the engine has such"


def other_kinds(bundled: Bundled) -> Kinds:
    kinds = Kinds()
    _triton(bundled, kinds)
    _kserve(bundled, kinds)
    return kinds


def _triton(bundled: Bundled, kinds: Kinds) -> None:
    threads = bundled.serving.get("threads")
    runtime = bundled.backend.with_threads(bundled.runtime, threads) if threads else dict(bundled.runtime)
    scripts = scripts_of(bundled.backend.name, runtime)
    # As members of the bundle: its own, unless they load the engine otherwise.
    at = {
        name: name if text.encode() == bundled.texts[name] else f"{triton.FOLDER}/{name}"
        for name, text in scripts.items()
    }
    linked = any(member.link for member in bundled.backend.members(runtime))
    try:
        made, native = _ensemble(bundled, runtime, at) if linked else _model(bundled, runtime, at)
    except triton.NotServable as refused:
        kinds.entries["triton"] = {"reason": str(refused)}
        return
    texts = dict(made.texts)
    used = {*made.files.values()}
    texts |= {at[name]: text.encode() for name, text in scripts.items() if at[name] in used and at[name] != name}
    entry: dict[str, Any] = {"files": made.files, "backend": native, "notes": made.notes, "model": made.model}
    if bundled.tritonserver is not None:
        try:
            entry["tried"] = _tried(bundled, made, texts)
        except NotLoaded as failed:
            kinds.entries["triton"] = {"reason": f"In {bundled.tritonserver.name} of this worker {failed}."}
            return
    kinds.texts |= texts
    kinds.entries["triton"] = entry


def _model(bundled: Bundled, runtime: Mapping[str, Any], at: Mapping[str, str]) -> tuple[triton.Repository, str]:
    """The repository of one engine, and the backend that runs it. `at`: the bundle's scripts → its members."""
    session = bundled.session
    native = _native(bundled, bundled.backend, bundled.engine, runtime)
    if not bundled.batched and any(not spec.shape for spec in (*session.inputs, *session.outputs)):
        native = _with_scalars(session.inputs)
    own = {name: name for name in (*names_in(bundled.engine), _MANIFEST)}
    served = _served(bundled, session.inputs, session.outputs, bundled.sample, native, bundled.batched)
    return triton.repository(replace(served, script={**own, **at})), native.backend


def _ensemble(bundled: Bundled, runtime: Mapping[str, Any], at: Mapping[str, str]) -> tuple[triton.Repository, str]:
    """The same of an engine of each model of a chain."""
    twice = {n: np.concatenate([a, a]) for n, a in bundled.sample.items()} if bundled.batched else {}
    links = ensemble.links(bundled.backend.members(runtime), bundled.engine, bundled.sample, twice)
    batched = bundled.batched and all(link.batched for link in links)  # in an ensemble all are, or none is
    texts, files, notes, models = dict[str, bytes](), dict[str, str](), list[str](), list[dict[str, Any]]()
    for place, link in enumerate(links, 1):
        folder, backend = link.member.folder, kernel.backends()[link.member.backend]()
        native = _native(bundled, backend, bundled.engine / folder, link.member.runtime)
        native = replace(native, files={name: f"{folder}/{file}" for name, file in native.files.items()})
        if not batched and any(not spec.shape for spec in (*link.inputs, *link.outputs)):
            native = _with_scalars(link.inputs)
        served = _served(bundled, link.inputs, link.outputs, link.sample, native, batched)
        name = f"{bundled.name}-{place}"
        own = ensemble.files_of(link.member, bundled.engine, at)
        served = replace(served, name=name, script=own, folder=f"{triton.FOLDER}/{folder}")
        if link is not links[-1]:
            served = replace(served, labels=())
        made = triton.repository(served)
        texts |= made.texts
        files |= made.files
        models.append(made.model)
        notes += [f"{name}: {note}" for note in made.notes]
    session = bundled.session
    found, told = ensemble.whole(
        bundled.name, models, [s.name for s in session.inputs], [s.name for s in session.outputs]
    )
    own_texts = {f"{triton.FOLDER}/ensemble/{path.partition('/')[2]}": text for path, text in found.items()}
    files |= dict(zip(found, own_texts, strict=True))
    notes.insert(0, ensemble.NOTE.format(names=", ".join(str(model["name"]) for model in models)))
    return triton.Repository({**texts, **own_texts}, files, notes, told), "ensemble"


def _native(bundled: Bundled, backend: Backend, engine: Path, runtime: Mapping[str, Any]) -> InTriton:
    return backend.in_triton(Instances(engine, runtime, int(bundled.serving["instances"]), bundled.hardware))


def _with_scalars(inputs: Sequence[TensorSpec]) -> InTriton:
    scalars = [spec.name for spec in inputs if not spec.shape]
    return InTriton(why=_SCALARS, parameters={"SCALARS": json.dumps(scalars)})


def _served(
    bundled: Bundled,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    sample: Arrays,
    native: InTriton,
    batched: bool,
) -> triton.Served:
    """Without `script`."""
    serving = bundled.serving
    one_by_one = any(axis is None for axis in (serving.get("batch_axis") or {}).values())
    accepts = (bundled.manifest.get("engine") or {}).get("accepts") or {}
    return triton.Served(
        name=bundled.name,
        machine=machine_of(bundled.backend.name, bundled.manifest),
        inputs=inputs,
        outputs=outputs,
        sample=sample,
        batched=batched and not one_by_one,
        serving=serving,
        formed=((bundled.manifest.get("deployment") or {}).get("serving") or {}).get("batches_formed") or (),
        group=devices.named(bundled.backend.device).triton_group,
        native=native,
        versions=bundled.versions,
        script={},
        accepts={spec.name: accepts[spec.name] for spec in inputs if spec.name in accepts},
        labels=bundled.manifest.get("labels") or (),
    )


def _tried(bundled: Bundled, made: triton.Repository, texts: Mapping[str, bytes]) -> dict[str, Any]:
    """What a real server made of it (`replayed`). Raises `NotLoaded`."""
    assert bundled.tritonserver is not None
    assert bundled.scratch is not None
    repository = bundled.scratch / "models"
    for path, member in made.files.items():
        target = repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if member in texts or member in bundled.texts:
            target.write_bytes(texts.get(member) or bundled.texts[member])
        else:
            link_or_copy(bundled.engine / member, target)
    precision = str((bundled.manifest.get("engine") or {}).get("precision", "fp32"))
    example = Example(bundled.name, bundled.sample, bundled.expected, made.model["max_batch_size"] > 0, precision)
    with running(bundled.tritonserver, repository, bundled.scratch, _READY_S) as server:
        return replayed(server, example)


def _kserve(bundled: Bundled, kinds: Kinds) -> None:
    if SERVER not in bundled.texts:
        kinds.entries["kserve"] = {"reason": "The bundle has no server of its own."}
        return
    deployment = bundled.manifest.get("deployment") or {}
    traffic = deployment.get("serving") or {}
    reasons = deployment.get("reasons") or {}
    memory, basis = _memory(bundled, deployment, traffic)
    kept = _kept(traffic, str(reasons.get("serving") or "the job told no traffic"))
    instances = int(bundled.serving["instances"])
    made = kserve.manifests(
        kserve.Deployed(
            name=bundled.name,
            machine=machine_of(bundled.backend.name, bundled.manifest),
            instances=instances,
            cpus=instances * int(bundled.serving.get("threads") or bundled.hardware.get("cores") or 1),
            memory_mb=memory,
            memory_basis=basis,
            pod_resource=devices.named(bundled.backend.device).pod_resource,
            rate=kept.rate,
            rate_interval=kept.interval,
            rate_basis=kept.basis,
            p99_ms=traffic.get("p99_limit_ms"),
            start_seconds=traffic.get("start_seconds"),
            reason=kept.reason,
            members=[*names_in(bundled.engine), *bundled.texts],
        )
    )
    kinds.texts |= made.texts
    kinds.entries["kserve"] = {"files": made.files, "notes": made.notes}


@dataclass(frozen=True)
class _Kept:
    """The rate that one server was proven to keep its limit at, and what it was measured with; None, and the reason."""

    rate: float | None = None
    interval: Sequence[float | None] | None = None
    basis: str = ""
    reason: str = ""


def _kept(traffic: Mapping[str, Any], untold: str) -> _Kept:
    """By the bundle's own server, where that was measured: its client had a part of the cores, so that it serves no
    less. Rate and interval are of one measurement."""
    if not traffic:
        return _Kept(reason=untold)
    http = traffic.get("goodput_over_http") is not None
    side, basis = ("goodput_over_http", _OVER_HTTP) if http else ("goodput", _IN_PROCESS)
    rate, limit = traffic.get(side), f"p99 within {traffic.get('p99_limit_ms')} ms"
    if not rate:
        return _Kept(reason=f"no rate was found that keeps {limit}" if rate is None else f"no rate keeps {limit}")
    if not traffic.get(f"{side}_proven"):
        return _Kept(reason=f"about {rate:.4g} requests/s were seen {basis} to keep {limit}, and that was not proven")
    return _Kept(rate, traffic.get(f"{side}_interval"), basis)


def _memory(bundled: Bundled, deployment: Mapping[str, Any], traffic: Mapping[str, Any]) -> tuple[float | None, str]:
    """What all processes of a server were seen to take, in MB (10⁶ bytes), and of what."""
    if traffic.get("memory_mb"):
        whole = traffic.get("memory_of") == "server"
        of = "of the server and the engine's processes" if whole else "of the engine's processes, without the server,"
        return float(traffic["memory_mb"]), f"{of} under the job's traffic"
    if deployment.get("memory_mb"):
        return float(deployment["memory_mb"]), "of the engine's processes while they were timed, without the server"
    one = (bundled.manifest.get("figures") or {}).get("memory_mb")
    if one:
        return int(bundled.serving["instances"]) * float(one), "of one process of the engine while it was timed, each"
    return None, ""
