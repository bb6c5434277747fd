"""Building a TensorRT plan: parse, profiles, flags, timing cache, progress, and what became of the graph.

Written against TensorRT 11, where precision lives in the ONNX alone; on 10.x the network is made strongly typed.
TensorRT for RTX builds without a GPU: its plan is then not loaded, and what it is made of not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.backends import signing
from workers.backends.tensorrt import graph as graphs
from workers.backends.tensorrt import messages, profiles, timing
from workers.backends.tensorrt.inspect import inspection_of, read_inspection, weights_bytes
from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.options import BuildOptions, RuntimeOptions
from workers.backends.tensorrt.probe import Gpu, probe_gpu, require_gpu
from workers.backends.tensorrt.progress import BUILDING, Progress, make_monitor
from workers.backends.tensorrt.sidecar import PLAN_FILE, write_sidecar
from workers.graph.onnx_files import MODEL_FILE, read_skeleton
from workers.graph.onnx_graph import all_nodes
from workers.kernel import Reporter

if TYPE_CHECKING:
    import tensorrt

CANCELLED = "build_cancelled"


@dataclass
class Building:
    """What one build holds; TensorRT's objects must be freed after what was made from them, so they stay here."""

    library: Library
    version: str
    gpu: Gpu  # that is built for
    log: messages.Log
    logger: tensorrt.ILogger
    builder: tensorrt.Builder
    network: tensorrt.INetworkDefinition
    config: tensorrt.IBuilderConfig
    options: BuildOptions

    @property
    def keeps_timings(self) -> bool:
        return self.options.timing_cache and self.library.keeps_timings


@dataclass
class Made:
    """`kept`: the timing cache, which the builder's objects need."""

    state: Building
    plan: tensorrt.IHostMemory
    wanted: list[profiles.Profile]
    cache_used: bool
    kept: tensorrt.ITimingCache | None


def build(library: Library, model: Path, out: Path, options: BuildOptions, reporter: Reporter) -> dict[str, Any]:
    """Build the plan of folder `model` into folder `out`, with its signed sidecar.

    Raises StageFailure: `gpu_unavailable`, `gpu_unsupported`, `tensorrt_unavailable`, `engine_key_missing`,
    `precision_unsupported`, `gpu_out_of_memory`, `invalid_profile`, `unsupported_op`, `parse_failed`,
    `engine_build_failed`, `build_cancelled`, `timing_cache_miss`, and what `read_graph` finds. Returns JSON: runtime,
    precision, profiles, layers, fused, memory, timing_cache, parser warnings.
    """
    here = _target(library, options)  # before TensorRT is touched
    # What is built for a target is the same, and tells the same, whether its GPU is here or not.
    gpu = here if library.needs_gpu or options.target is None else Gpu.elsewhere(here.compute_capability)
    signing.require_key()  # before minutes are spent
    facts = graphs.read_graph(model)
    graphs.check_gpu(facts, here)
    if options.precision:
        _check_asked(options.precision, gpu)
    profiles.profiles_for(facts.inputs, options)  # what contradicts itself is refused before anything is parsed
    reporter.progress(0.02, "TensorRT: parsing")
    state = _parsed(library, gpu, options, model)
    _tell_types(reporter, facts)
    path = timing.cache_path(state.version, gpu) if state.keeps_timings else None
    made = make_plan(state, model, facts, path, Progress(reporter, options.max_seconds))
    state, plan = made.state, made.plan
    with (out / PLAN_FILE).open("wb") as file:
        file.write(memoryview(plan))
    cache_facts: dict[str, Any] = {"used": made.cache_used, "stored": False}
    if state.keeps_timings:
        cache_facts |= _cache_kept(state, path, reporter)
    reporter.progress(BUILDING[1], "TensorRT: reading the plan")
    found = _inspect(state, plan, _ops(model))
    del plan, made.plan
    return _result(state, out, facts, made.wanted, found, cache_facts)


def _parsed(library: Library, gpu: Gpu, options: BuildOptions, model: Path) -> Building:
    state = start(library, gpu, options)
    if errors := parse(state, model):
        raise messages.parse_failure(errors, state.log)
    return state


def make_plan(state: Building, model: Path, facts: graphs.GraphFacts, path: Path | None, progress: Progress) -> Made:
    """Build; where the builder refuses a profile that was derived, with shorter ones."""
    options, longest = state.options, profiles.LONGEST
    given = options.shapes or options.profiles or options.shape_values
    while True:
        wanted = profiles.profiles_for(facts.inputs, options, longest)
        _configure(state)
        _add_profiles(state, wanted)
        kept, filled = timing.attach(state.config, path) if state.keeps_timings else (None, False)
        try:
            return Made(state, _build_plan(state, progress), wanted, filled, kept)
        except StageFailure as failure:
            shorter = profiles.shorter(longest, failure.detail)
            if failure.code != "invalid_profile" or given or not wanted or shorter is None:
                raise
            longest = shorter
        del kept
        state = _parsed(state.library, state.gpu, options, model)


def _target(library: Library, options: BuildOptions) -> Gpu:
    """The GPU that is built for: this machine's, or any of the compute capability that is asked for."""
    asked, here = options.target, probe_gpu()
    if asked is None or library.needs_gpu:
        gpu = require_gpu()
    else:
        gpu = here if isinstance(here, Gpu) and here.compute_capability == asked else Gpu.elsewhere(asked)
    if not library.builds_for(gpu.compute_capability) or (asked or gpu.compute_capability) != gpu.compute_capability:
        raise StageFailure(
            "gpu_unsupported",
            f"{library.title} does not build for compute capability {asked or gpu.compute_capability} here; it does "
            f"for {', '.join(library.capabilities) or 'the GPU at hand'}.",
            FailureKind.INFRASTRUCTURE,
            remedy="Use a GPU that it supports, or the backend onnxruntime-cuda.",
            cacheable=False,
        )
    return gpu


def start(library: Library, gpu: Gpu, options: BuildOptions) -> Building:
    trt, version = library.load(), library.version()
    log = messages.Log()
    logger = messages.make_logger(library, log)
    library.register_plugins(logger)
    try:
        builder = trt.Builder(logger)
    except Exception as error:  # pybind11: "factory function returned nullptr"
        raise messages.driver_failure(log.errors[-1] if log.errors else str(error)) from error
    # 11 has no other networks; on 10 it is a flag, whose number differs between versions; and so for RTX (1.x).
    old = int(version.split(".", maxsplit=1)[0]) < 11
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if old else 0
    network, config = builder.create_network(flags), builder.create_builder_config()
    if network is None or config is None:
        raise messages.driver_failure(log.last())
    return Building(library, version, gpu, log, logger, builder, network, config, options)


def parse(state: Building, model: Path) -> list[dict[str, Any]]:
    """Take in the model; every error of the parser, `messages.parser_errors`."""
    parser: tensorrt.OnnxParser = state.library.load().OnnxParser(state.network, state.logger)
    # From the file, not from bytes: weights beside it are then found.
    parsed = parser.parse_from_file(str(model / MODEL_FILE))
    errors = messages.parser_errors(parser)
    if not errors and not parsed:
        errors = [messages.parser_error("INTERNAL_ERROR", state.log.last())]
    if not errors and (state.network.num_inputs == 0 or state.network.num_outputs == 0):
        errors = [messages.parser_error("INVALID_GRAPH", "it found no inputs or no outputs in the model")]
    return errors


def _configure(state: Building) -> None:
    trt, library = state.library.load(), state.library
    config, options = state.config, state.options
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    config.builder_optimization_level = options.optimization_level
    config.avg_timing_iterations = options.avg_timing_iterations
    if options.max_tactics is not None:
        config.max_num_tactics = options.max_tactics
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Named only where asked for: early versions of 10 lack the last.
    if options.hardware_compatibility == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same_compute_capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    library.set_target(config, state.gpu.compute_capability)
    flag = trt.BuilderFlag
    keeps = state.keeps_timings
    switches = [
        (flag.TF32, options.tf32),
        (flag.SPARSE_WEIGHTS, options.sparsity),
        (flag.VERSION_COMPATIBLE, options.version_compatible),
        # A version-compatible plan would carry a runtime, which is host code: it stays out, and the loader needs none.
        (flag.EXCLUDE_LEAN_RUNTIME, options.version_compatible),
        (flag.EDITABLE_TIMING_CACHE, keeps),
        (flag.DISABLE_TIMING_CACHE, not keeps),
        (flag.ERROR_ON_TIMING_CACHE_MISS, options.exact_timing and library.keeps_timings),
    ]
    for which, on in switches:
        if on:
            config.set_flag(which)
        else:
            config.clear_flag(which)


def _add_profiles(state: Building, wanted: list[profiles.Profile]) -> None:
    """Set the profiles on the network's inputs, shape inputs by their values; raises `invalid_profile`."""
    values = state.options.shape_values or {}
    tensors = (state.network.get_input(i) for i in range(state.network.num_inputs))
    shape_inputs = [t.name for t in tensors if t is not None and t.is_shape_tensor]
    for name in shape_inputs:
        if name not in values:
            raise model_failure(
                "invalid_profile",
                f"Input {name!r} sets the shape of other tensors; TensorRT needs the range of its values.",
                tensor=name,
                remedy="Make it a constant of the model, so that shapes follow from the other inputs.",
            )
    if wanted or shape_inputs:
        for shapes in wanted or [{}]:
            _add_profile(state, shapes, {name: values[name] for name in shape_inputs})


def _add_profile(state: Building, shapes: profiles.Profile, values: Mapping[str, Mapping[str, list[int]]]) -> None:
    trt = state.library.load()
    profile = state.builder.create_optimization_profile()
    if profile is None:
        raise _refused_profile(None, state.log.last())
    for name, allowed in shapes.items():
        low, opt, high = (trt.Dims(list(shape)) for shape in allowed)
        try:
            profile.set_shape(name, low, opt, high)
        except Exception as error:  # the binding checks min ≤ opt ≤ max and raises ValueError
            raise _refused_profile(name, str(error)) from error
    for name, given in values.items():
        profile.set_shape_input(name, given["min"], given["opt"], given["max"])
    if not profile or state.config.add_optimization_profile(profile) < 0:
        raise _refused_profile(None, state.log.last())


def _refused_profile(name: str | None, why: str) -> StageFailure:
    """Of kind MODEL, unlike what contradicts the job's own shapes: other backends may take the model."""
    return model_failure(
        "invalid_profile",
        f"TensorRT refuses the optimization profile: {why}",
        tensor=name,
        remedy="Give every dynamic input min ≤ opt ≤ max that agree with the model.",
    )


def _build_plan(state: Building, progress: Progress) -> tensorrt.IHostMemory:
    monitor = make_monitor(state.library, progress)
    state.config.progress_monitor = monitor
    try:
        plan = state.builder.build_serialized_network(state.network, state.config)
    except MemoryError:
        raise
    except Exception as error:
        state.log.add(True, str(error))
        plan = None
    if progress.cancelled:
        raise model_failure(
            CANCELLED,
            "The TensorRT build was ended before it was finished.",
            remedy="Give the job a larger budget, or a lower optimization level.",
            cacheable=False,
        )
    if plan is None:
        raise messages.build_failure(state.log, state.gpu.name)
    return plan


def _cache_kept(state: Building, path: Path | None, reporter: Reporter) -> dict[str, Any]:
    """What became of the timing cache. A full disk or a folder without rights costs the next build time, not this
    one its plan."""
    try:
        return timing.merge(state.config, path)
    except Exception as error:  # the binding's own kinds, too
        reporter.note("TensorRT's timing cache was not kept.", reason=str(error)[:300])
        return {"stored": False}


def _inspect(state: Building, plan: tensorrt.IHostMemory, ops: Mapping[str, str]) -> dict[str, Any]:
    """Load the plan that was just built, from memory, and read what it is made of and what memory it takes."""
    if not state.gpu.here:
        return read_inspection("", ops) | {
            "memory": None,
            "reason": "the plan was not loaded: it was built without its GPU",
        }
    runtime: tensorrt.Runtime = state.library.load().Runtime(state.logger)
    engine = runtime.deserialize_cuda_engine(memoryview(plan))
    if engine is None:
        raise messages.load_failure(state.log)
    found = read_inspection(inspection_of(state.library, engine), ops)
    found["memory"] = engine_memory(state.library, engine)
    return found


def engine_memory(library: Library, engine: tensorrt.ICudaEngine) -> dict[str, Any]:
    """Bytes of weights and, per profile, of activations."""
    count = int(engine.num_optimization_profiles)
    return {
        "weights_bytes": weights_bytes(library, engine),
        "activation_bytes": int(engine.device_memory_size_v2),
        "activation_bytes_by_profile": [int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(count)],
    }


def _result(
    state: Building,
    out: Path,
    facts: graphs.GraphFacts,
    wanted: list[profiles.Profile],
    found: dict[str, Any],
    cache_facts: dict[str, Any],
) -> dict[str, Any]:
    options, gpu = state.options, state.gpu
    told = profiles.to_json(wanted)
    precision = options.precision or "+".join(facts.precisions) or ("tf32" if options.tf32 else "fp32")
    write_sidecar(
        out,
        {
            "library": state.library.name,
            "tensorrt": state.version,
            "gpu": gpu.to_json(),
            "precision": precision,
            "profiles": told,
            "inputs": [[s.name, s.dtype, list(s.shape)] for s in facts.inputs],
            "outputs": [[s.name, s.dtype, list(s.shape)] for s in facts.outputs],
            "version_compatible": options.version_compatible,
            "hardware_compatibility": options.hardware_compatibility,
        },
    )
    runtime = RuntimeOptions(cuda_graph=options.cuda_graph, declared=facts.declared)
    return {
        "runtime": runtime.to_json(),
        "precision": precision,
        "precisions_in_graph": list(facts.precisions),
        "tf32": options.tf32,
        "profiles": told,
        "profiles_derived": bool(told) and not (options.shapes or options.profiles),
        "timing_cache": cache_facts,
        "warnings": state.log.warnings[:20],
        **found,
    }


def _check_asked(precision: str, gpu: Gpu) -> None:
    if precision in graphs.NEEDS and not gpu.supports(*graphs.NEEDS[precision]):
        raise graphs.precision_unsupported(precision, gpu.name, gpu.compute_capability)


def _tell_types(reporter: Reporter, facts: graphs.GraphFacts) -> None:
    if facts.declared or facts.float64_tensors:
        reporter.note(
            "TensorRT computes float64 in float32; inputs and outputs keep the model's type.",
            tensors=sorted(facts.declared),
            float64_tensors=facts.float64_tensors,
        )


def _ops(model: Path) -> dict[str, str]:
    return {n.name: n.op_type for n in all_nodes(read_skeleton(model / MODEL_FILE)) if n.name}
