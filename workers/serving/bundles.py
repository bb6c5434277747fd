"""What a bundle holds for other servers: texts beside its own files, and which of all these make up each kind
(`app.artifacts.kinds`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers import devices
from workers.artifacts import names_in
from workers.bundle_readme import machine_of
from workers.graph.onnx_files import link_or_copy
from workers.kernel import Backend, Session
from workers.measure.axes import batch_axes
from workers.members import scripts_of
from workers.serving import kserve, triton
from workers.serving.launching import SERVER
from workers.serving.native import Instances, InTriton
from workers.serving.triton_server import Example, NotLoaded, replayed, running

if TYPE_CHECKING:
    from pathlib import Path

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


def follows_batch(session: Session, expected: Arrays, twice: Arrays) -> bool:
    """Whether the first axis of every input and output is the batch: `twice` came out for two samples where `expected`
    did for one."""
    axes = batch_axes(session.inputs)
    free = all(axes[spec.name] == 0 and isinstance(spec.shape[0], str) for spec in session.inputs)
    return free and all(
        array.shape and name in twice and twice[name].shape == (2 * array.shape[0], *array.shape[1:])
        for name, array in expected.items()
    )


def _triton(bundled: Bundled, kinds: Kinds) -> None:
    serving, backend = bundled.serving, bundled.backend
    threads = serving.get("threads")
    runtime = backend.with_threads(bundled.runtime, threads) if threads else dict(bundled.runtime)
    native = backend.in_triton(Instances(bundled.engine, runtime, int(serving["instances"]), bundled.hardware))
    scalars = [spec.name for spec in bundled.session.inputs if not spec.shape]
    if not bundled.batched and any(not spec.shape for spec in (*bundled.session.inputs, *bundled.session.outputs)):
        native = InTriton(why=_SCALARS, parameters={"SCALARS": json.dumps(scalars)})
    scripts = scripts_of(backend.name, runtime)
    # As members of the bundle: its own, unless they load the engine otherwise.
    at = {
        name: name if text.encode() == bundled.texts[name] else f"{triton.FOLDER}/{name}"
        for name, text in scripts.items()
    }
    one_by_one = any(axis is None for axis in (serving.get("batch_axis") or {}).values())
    served = triton.Served(
        name=bundled.name,
        machine=machine_of(backend.name, bundled.manifest),
        inputs=bundled.session.inputs,
        outputs=bundled.session.outputs,
        sample=bundled.sample,
        batched=bundled.batched and not one_by_one,
        serving=serving,
        formed=((bundled.manifest.get("deployment") or {}).get("serving") or {}).get("batches_formed") or (),
        group=devices.named(backend.device).triton_group,
        native=native,
        versions=bundled.versions,
        script={**{name: name for name in (*names_in(bundled.engine), _MANIFEST)}, **at},
        accepts=(bundled.manifest.get("engine") or {}).get("accepts") or {},
        labels=bundled.manifest.get("labels") or (),
    )
    try:
        made = triton.repository(served)
    except triton.NotServable as refused:
        kinds.entries["triton"] = {"reason": str(refused)}
        return
    texts = dict(made.texts)
    used = {*made.files.values()}
    texts |= {at[name]: text.encode() for name, text in scripts.items() if at[name] in used and at[name] != name}
    entry: dict[str, Any] = {"files": made.files, "backend": native.backend, "notes": made.notes, "model": made.model}
    if bundled.tritonserver is not None:
        try:
            entry["tried"] = _tried(bundled, served, made.files, texts)
        except NotLoaded as failed:
            kinds.entries["triton"] = {"reason": f"In {bundled.tritonserver.name} of this worker {failed}."}
            return
    kinds.texts |= texts
    kinds.entries["triton"] = entry


def _tried(
    bundled: Bundled, served: triton.Served, files: Mapping[str, str], texts: Mapping[str, bytes]
) -> dict[str, Any]:
    """What a real server made of it (`replayed`). Raises `NotLoaded`."""
    assert bundled.tritonserver is not None
    assert bundled.scratch is not None
    repository = bundled.scratch / "models"
    for path, member in files.items():
        target = repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if member in texts or member in bundled.texts:
            target.write_bytes(texts.get(member) or bundled.texts[member])
        else:
            link_or_copy(bundled.engine / member, target)
    precision = str((bundled.manifest.get("engine") or {}).get("precision", "fp32"))
    example = Example(bundled.name, bundled.sample, bundled.expected, served.batched, precision)
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
