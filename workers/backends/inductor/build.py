"""From an exported program to an engine: lowered, compiled by AOTInductor, tried in a process of its own, signed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure, model_failure
from app.settings import child_environment
from workers.backends import signing
from workers.backends.inductor import caching
from workers.backends.inductor.library import contained, failure, library, target
from workers.backends.inductor.lowering import lowered
from workers.backends.inductor.options import BuildOptions, RuntimeOptions
from workers.backends.inductor.session import exact_products, load_session
from workers.backends.inductor.sidecar import PACKAGE_FILE, Sidecar
from workers.backends.inductor.sizes import expect_batch
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder, quiet
from workers.graph.interface import Interface
from workers.hardware import CXX
from workers.kernel import Reporter
from workers.measure.axes import batch_axes, fixed_batch

_TYPES = frozenset({"float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"})
# Loads a package and does nothing else: a loader that crashes takes this process down, and no other.
_LOADS = "import sys, torch; torch._C._aoti.AOTIModelPackageLoader(sys.argv[1], 'model', True, 1, -1)"
_LOADS_WITHIN_S = 120.0
_NO_TMP = "create temporary directory"  # of the loader up to torch 2.12, which unpacks below /tmp


def build(model: Path, out: Path, options: BuildOptions, device: str, reporter: Reporter) -> dict[str, Any]:
    """Compile `model`, an exported program, into `out`.

    Raises StageFailure: `backend_unavailable`, `compiler_missing`, `invalid_model`, `unsupported_io`,
    `unsafe_program`, `unsupported_op`, `nothing_to_convert`, `precision_unsupported`, `compile_failed`,
    `out_of_memory`, `gpu_out_of_memory`, `storage_full`, `engine_key_missing`, `load_failed`, `inference_failed`.
    Returns `runtime`, `form`, `precision`, `fused` (batch norms, products in float8), `compiler`, `trial_run`.
    """
    signing.require_key()  # before a minute is spent
    compiler = require_compiler()
    torch = library(compiles=True)
    exact_products(torch, options.precision)
    with contained() as folder, quiet(), torch.no_grad():
        source = ProgramFolder.read(model)
        _check_types(source.interface)
        reporter.progress(0.1, "lowering")
        magnitudes = program_ranges.read(model)
        graph, fused = _lowered(torch, source, options, device, magnitudes)
        reporter.progress(0.2, "compiling")
        form = options.form or "package"
        if form == "package":
            _compile(graph, source, out / PACKAGE_FILE, options, device, tuned=bool(magnitudes))
            reporter.progress(0.8, "loading")
            why = _refused(out / PACKAGE_FILE, folder)
            if why is not None:
                # Where /tmp is out of reach, files are not moved from folder to folder either, and the bundle of the
                # other form compiles in processes of its own, which do that.
                if options.form is not None or (device == "cuda" and _NO_TMP in why):
                    raise _unloadable(why)
                reporter.note("AOTInductor's package cannot be loaded here; the engine is its cache.", reason=why)
                (out / PACKAGE_FILE).unlink()
                graph, _ = _lowered(torch, source, options, device, magnitudes)  # compiling rewrote the first
                form = "cache"
        if form == "cache":
            try:
                caching.write(graph, source, out, options, device)
            except StageFailure:
                raise
            except Exception as error:  # as in `_compile`
                raise _cannot(error) from error
        source.interface.write(out)
        sidecar = Sidecar(form, source.order, source.ranges, (), options.precision, target(device))
        sidecar.write(out)
        trial, fixed = _tried(source, out, RuntimeOptions(form=form), device, options, reporter)
        if fixed:
            Sidecar(**{**vars(sidecar), "fixed": fixed}).write(out)
    return {
        "runtime": RuntimeOptions(form=form).to_json(),
        "form": form,
        "precision": "fp8" if magnitudes else options.precision,
        "fused": fused,
        "compiler": Path(compiler).name,
        "trial_run": trial,
    }


def require_compiler() -> str:
    """The C++ compiler that Inductor calls. Raises StageFailure(`compiler_missing`)."""
    found = next((path for name in CXX if (path := shutil.which(name))), None)
    if found is None:
        raise StageFailure(
            "compiler_missing",
            "Inductor compiles with a C++ compiler, and this worker has none.",
            FailureKind.MODEL,  # of this engine alone: the job has others
            remedy="Ask the operator to install g++ (12 or newer); engines that were built run without it.",
            cacheable=False,
        )
    return found


def _check_types(interface: Interface) -> None:
    for spec in (*interface.inputs, *interface.outputs):
        if spec.dtype not in _TYPES:
            raise model_failure(
                "unsupported_io",
                f"Tensor {spec.name!r} is {spec.dtype}, which cannot be handed to torch as an array.",
                tensor=spec.name,
                remedy="Use another backend for this model, or export it with float32 inputs and outputs.",
            )


def _lowered(
    torch: Any, source: ProgramFolder, options: BuildOptions, device: str, magnitudes: Mapping[str, float] | None
) -> tuple[Any, dict[str, int]]:
    try:
        graph, fused = lowered(torch, source.program, options.precision, device, magnitudes)
        if options.batch is not None:
            _, held = source.batch_sizes(options.batch)
            expect_batch(graph, batch_axes(source.interface.inputs), held)
        return graph, fused
    except StageFailure:
        raise
    except Exception as error:  # whatever a graph of another making trips over
        raise _cannot(error) from error


def settings(options: BuildOptions) -> dict[str, Any]:
    """Inductor's own names and values. Weights are constants ("freezing"): on a CPU they are packed for oneDNN, on a
    GPU products of one input become one, and convolutions' weights are laid out once; threads are torch's at the time
    of the call, not of the build."""
    found: dict[str, Any] = {"cpp.dynamic_threads": True, "compile_threads": 1, "freezing": True}
    if options.channels_last:
        found["force_layout_optimization"] = True
    return found


def _compile(
    graph: Any, source: ProgramFolder, package: Path, options: BuildOptions, device: str, *, tuned: bool
) -> None:
    """`tuned`: more layouts of each kernel are timed. Where kernels round to float8 it gained 2 to 3 % (ViT-B/16 and
    BERT-base at batch 32 on an H200); in float16 up to 2 % there, and at batch 1 it lost as much."""
    torch = library()
    from torch._inductor.package.package import package_aoti

    args, kwargs = source.program.example_inputs
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    wanted = {
        **settings(options),
        "coordinate_descent_tuning": tuned,
        "aot_inductor.package": True,
        "cpp.cxx": (require_compiler(),),
    }
    try:
        files = torch._inductor.aot_compile(graph, args, kwargs, options=wanted)
        package_aoti(str(package), files)
    except Exception as error:  # Dynamo's, Inductor's, the C++ compiler's, and of any pass in between
        raise _cannot(error) from error


def _refused(package: Path, folder: Path) -> str | None:
    """Why a fresh process does not load the package, or ends while it does; None where it does. With some builds of
    torch (2.11 of one vendor) every load ends in a segmentation fault."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOADS, str(package)],
            env=child_environment() | {"TMPDIR": str(folder), "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LOADS_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its loader did not end within {_LOADS_WITHIN_S:.0f} s"
    if done.returncode < 0:
        return f"its loader crashed (signal {-done.returncode})"
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"its loader failed: {' '.join(last)[:300]}"
    return None


def _tried(
    source: ProgramFolder, out: Path, runtime: RuntimeOptions, device: str, options: BuildOptions, reporter: Reporter
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Load it and run it twice on random inputs: the batch size, and the outputs that lie in memory of the engine's
    own. Where generated inputs do not suit the model, nothing is known of the first, and all outputs are copied."""
    from workers.data import synthetic_feeds

    session = load_session(out, runtime, device)
    names = [spec.name for spec in session.outputs]
    batch = fixed_batch(session.inputs) or 1
    feeds: dict[str, Any] = {}
    try:
        feeds = synthetic_feeds(session.inputs, batch, options.shapes, 0)
        first, second = session.raw(feeds), session.raw(feeds)
        return {"batch": batch}, tuple(n for n in names if np.may_share_memory(first[n], second[n]))
    except StageFailure as refused:
        if refused.code in ("out_of_memory", "gpu_out_of_memory") or (feeds and _runs(source, feeds)):
            raise
        reporter.note("The trial run tells nothing: generated inputs do not suit the model.", reason=refused.detail)
        return None, tuple(names)
    finally:
        session.close()


def _runs(source: ProgramFolder, feeds: Mapping[str, Any]) -> bool:
    """Whether torch runs the program itself on these inputs."""
    torch = library()
    given = {name: torch.from_numpy(np.array(feeds[name])) for name in source.order}
    flat = [given.get(name, name) for name in source.program.graph_signature.user_inputs]
    args, kwargs = torch.utils._pytree.tree_unflatten(flat, source.program.call_spec.in_spec)
    try:
        source.program.module()(*args, **kwargs)
    except Exception:  # whatever its operators say of such inputs
        return False
    return True


def _cannot(error: Exception) -> StageFailure:
    found = failure("compile_failed", error)
    if found.code != "compile_failed":
        return found
    return model_failure(
        "compile_failed",
        f"Inductor cannot compile the program: {found.detail.removeprefix('Torch: ')}",
        remedy="The job's other engines come from its ONNX model; to use Inductor, export the program with standard "
        "ATen operators on tensors.",
    )


def _unloadable(why: str) -> StageFailure:
    return StageFailure(
        "load_failed",
        f"AOTInductor's package cannot be loaded here: {why}.",
        FailureKind.MODEL,
        remedy="Ask the operator for torch 2.13 or newer, or for a home outside of /tmp and user namespaces."
        if _NO_TMP in why
        else "Use the form `cache`, or another build of torch.",
        cacheable=False,
    )
