"""The README of a bundle, made from its manifest: it says nothing that the manifest does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workers import devices


def readme(name: str, backend: str, manifest: Mapping[str, Any]) -> str:
    """Markdown. Figures, deployment and serving are told where the manifest has them."""
    lines = [
        f"# {name}",
        "",
        f"{_what(backend, manifest)}, built and measured on {machine_of(backend, manifest)}.",
        "",
        "    pip install -r requirements.txt",
        "    python infer.py                      # runs sample_input.npz, compares with expected_output.npz",
        "    python infer.py INPUT.npz OUTPUT.npz # arrays named by the model's inputs",
        "    python serve.py --port 8000          # the Open Inference Protocol v2 over HTTP; or: docker build .",
        "",
        "`python infer.py` ends with exit code 1 where an output differs by more than the precision's rounding.",
        "In Python: `names, run = infer.load()`, then `run({name: array})`, which many threads may call.",
        "",
        *_told("The chain", _chain(manifest.get("chain") or {})),
        *_told("Two engines", _by_batch((manifest.get("engine") or {}).get("by_batch") or {})),
        *_told("Figures", _figures(manifest.get("figures") or {})),
        *_told("Sizes that it takes", _sizes((manifest.get("engine") or {}).get("accepts") or {})),
        *_told("Deployment", _deployment(manifest.get("deployment") or {})),
        *_told("Serving", _serving(name, manifest.get("serving") or {})),
        "`manifest.json` has the job's id, all figures, and the digests of the model, the data and the engine.",
        "`kinds.json`, `triton/` and `kserve/` are what the bundle's other kinds are made of, which the service sends.",
        "An engine may be specific to the hardware it was built for: run the job again for another kind of machine.",
    ]
    if manifest.get("not_repeatable"):
        what = ", ".join(manifest["not_repeatable"])
        lines += ["", f"Not compared, because they differ from call to call: {what}."]
    return "\n".join(lines) + "\n"


def _what(backend: str, manifest: Mapping[str, Any]) -> str:
    apart = ((manifest.get("engine") or {}).get("runtime") or {}).get("engines") or ()
    if manifest.get("chain") and apart:
        return f"{len(apart)} engines, one of each model of a chain, for `{apart[0]['backend']}`"
    both = ((manifest.get("engine") or {}).get("by_batch") or {}).get("engines") or ()
    names = " and ".join(dict.fromkeys(f"`{engine['backend']}`" for engine in both))
    return f"Two engines for {names}" if both else f"An engine for `{backend}`"


def machine_of(backend: str, manifest: Mapping[str, Any]) -> str:
    hardware = manifest.get("hardware", {})
    label = devices.of_backend(backend).label(hardware) or devices.HOST.label(hardware)
    return label or str(hardware.get("id", "one machine"))


def _told(title: str, items: Iterator[str]) -> list[str]:
    found = [f"- {item}" for item in items]
    return [f"## {title}", "", *found, ""] if found else []


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    if figures.get("latency_ms") is None:
        return
    interval = figures.get("speedup_ci")
    shown = f" [{interval[0]:.2f}, {interval[1]:.2f}] (95 %)" if interval else ""
    shape = figures.get("shape")
    at = f"batch size {figures.get('batch_size')}" + (f", shape {_shape(shape)}" if shape else "")
    yield (
        f"{figures['speedup']}{shown} as fast as the original at {at}: p50 {figures['latency_ms']:.4g} ms by a call of "
        f"`run`, the original's {_number(figures.get('original_latency_ms'))} ms by ONNX Runtime's `session.run`"
    )
    bound = figures.get("bound")
    if bound and bound.get("p50_ms") is not None:
        yield f"p50 {bound['p50_ms']:.4g} ms where inputs and outputs are bound before"
    loss = figures.get("accuracy_loss_percent")
    metric = figures.get("accuracy_metric")
    if loss is not None and metric is not None:
        ours, theirs = (_number(figures.get(k)) for k in ("accuracy_value", "original_accuracy_value"))
        yield (
            f"accuracy loss {loss:.3g} ({metric}: {ours}, the original {theirs}; {figures.get('accuracy_samples')} "
            f"samples, by {figures.get('accuracy_basis')}), the limit was {_number(figures.get('limit_percent'))}"
            + (f": {figures['accuracy_verdict']}" if figures.get("accuracy_verdict") else "")
        )
    if figures.get("memory_mb") is not None:
        yield f"{figures['memory_mb']:.4g} MB of memory, {_number(figures.get('size_mb'))} MB on disk"


def _chain(told: Mapping[str, Any]) -> Iterator[str]:
    """What goes where."""
    for model in told.get("models") or ():
        joints = [f"`{given}` of the one before as `{own}`" for own, given in (model.get("connect") or {}).items()]
        taken = [f"`{name}`" for name in model.get("taken") or ()]
        gives = ", ".join(f"`{tensor['name']}`" for tensor in model.get("outputs") or ())
        own = model.get("engine")
        engine = f"; its engine, for `{own['backend']}`, lies in `{own['folder']}/`" if own else ""
        yield f"{model['name']}: takes {', '.join([*joints, *taken])}; gives {gives}{engine}"


def _by_batch(told: Mapping[str, Any]) -> Iterator[str]:
    """Which batch goes to which, and what that takes."""
    for engine in told.get("engines") or ():
        most = "and more" if engine["most"] is None else f"to {engine['most']}"
        loss = _number(engine.get("accuracy_loss_percent"))
        yield f"batches of {engine['least']} {most}: {engine['name']} ({engine['backend']}), accuracy loss {loss}"
    for at in told.get("batches") or ():
        if at.get("speedup") is not None:
            alone = f"{_number(at.get('small_speedup'))}x and {_number(at.get('large_speedup'))}x"
            yield f"batch size {at['batch']}: {at['speedup']:.2f}x as fast as the original, either alone {alone}"
    if told.get("engines"):
        yield "`run` chooses by the batch size of each call; both engines are loaded, and take the memory of both"


def _sizes(accepts: Mapping[str, Any]) -> Iterator[str]:
    for name, bounds in accepts.items():
        for axis, bound in enumerate(bounds):
            if bound is not None:
                least, most = bound
                allowed = f"at least {least}" if most is None else f"{least or 0} to {most}"
                yield f"`{name}`, axis {axis}: {allowed}; `run` refuses others, which the original takes"


def _deployment(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("instances") is not None:
        yield (
            f"{config['instances']} instance(s) with {config.get('threads_per_instance')} thread(s) each, batch size "
            f"{config.get('batch_size')}: {_number(config.get('throughput_qps'))} samples per second together, p50 "
            f"{_number(config.get('p50_latency_ms'))} ms; runtime options: {dict(config.get('runtime') or {})}"
        )
    else:
        reason = config.get("reason") or (config.get("reasons") or {}).get("choice")
        if reason:
            yield str(reason)


def _serving(name: str, settings: Mapping[str, Any]) -> Iterator[str]:
    if not settings:
        return
    yield (
        f"`POST /v2/models/{name}/infer`, JSON or Triton's binary tensors; `/v2/health/live`, `/v2/health/ready`, "
        "`/metrics` (Prometheus). 503 with Retry-After where the queue is full; SIGTERM ends it when what it took is "
        "answered"
    )
    threads = settings.get("threads")
    yield (
        f"`serving.json`: {settings['instances']} instance(s)"
        + (f" with {threads} thread(s) each" if threads else "")
        + f", batches of up to {settings['max_batch']}, for which a request waits at most "
        f"{_number(settings['max_delay_ms'])} ms"
    )
    if settings.get("reason"):
        yield str(settings["reason"])


def _shape(shape: Any) -> str:
    dims = shape.get("dims", shape) if isinstance(shape, Mapping) else shape
    return ", ".join(f"{n} {list(d)}" for n, d in dims.items()) if isinstance(dims, Mapping) else str(dims)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"
