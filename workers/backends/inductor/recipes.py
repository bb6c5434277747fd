"""What Inductor is worth trying with. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workers import recipes
from workers.artifacts import EXPORTED_PROGRAM
from workers.backends.inductor.gains import only_for_programs
from workers.candidates import Candidate, Case, Proposal, Skipped, Step

# Expected p50 over ONNX Runtime's fp32 default, by kind: fp32, bf16. Guesses beside OpenVINO's measured ones; they
# decide the order of trying and nothing else.
_CPU_PRIORS = {"cnn": (1.0, 0.6), "transformer": (1.0, 0.6), "rnn": (1.2, 1.0), "other": (1.0, 0.8)}
# Over the CUDA provider's fp32, whose own fp16 is at 0.4. Of fp16's time fp8 took 0.79 to 0.96 on transformers
# (docs/gpu-figures.md).
_CUDA_PRIORS = {"fp32": 0.9, "bf16": 0.3, "fp16": 0.28, "fp8": 0.26}
# Compiling takes a minute of a small budget, in which several other engines are built and timed.
LEAST_BUDGET_S = 60
_MOST_EXPECTED = 32  # samples, at which kernels fill a GPU; at more, timing their layouts takes memory
_FP8_SAMPLES = 64  # each is an inference in float32 on the CPU
_HALF_FROM = {"fp16": 7.0, "bf16": 8.0}  # compute capability
FP8_FROM = 8.9
_KINDS_OF_PRODUCTS = (("Conv", "ConvTranspose"), ("MatMul", "Gemm", "Attention"))


@dataclass(frozen=True)
class _Place:
    """One of the two backends. `prefix`: of its candidates' ids; `words`: where it runs, in their names.
    `options_gain`: as a candidate's."""

    backend: str
    prefix: str
    words: str = ""
    options_gain: float | None = None


_ON_CPU = _Place("inductor", "ti")
_ON_CUDA = _Place("inductor-cuda", "tic", "CUDA, ", recipes.GRAPH_GAIN)


def propose_cpu(case: Case) -> Proposal:
    why = _why_not(case)
    if why is not None:
        return Proposal(skipped=(Skipped("Torch Inductor", why),))
    candidates, skipped = [], []
    fp32, bf16 = _CPU_PRIORS.get(case.kind, _CPU_PRIORS["other"])
    if case.wants("fp32"):
        candidates.append(_candidate(_ON_CPU, "fp32", fp32))
    if case.wants("bf16"):
        if not case.bf16_pays:
            skipped.append(Skipped("ti-bf16", "the processor has no bf16 instructions"))
        elif not _products(case):
            skipped.append(Skipped("ti-bf16", "the model has no float32 products to convert"))
        else:
            candidates.append(_candidate(_ON_CPU, "bf16", bf16))
    return Proposal(tuple(candidates), tuple(skipped))


def lacking(case: Case) -> tuple[Skipped, ...]:
    """What a worker without PyTorch says of it: it never gets a program, which only others take."""
    return (Skipped("Torch Inductor", only_for_programs(case, here=False)),)


def propose_cuda(case: Case, capability: float) -> Proposal:
    if case.spec.target.device == "cpu":
        return Proposal()
    why = _why_not(case)
    if why is not None:
        return Proposal(skipped=(Skipped("Torch Inductor on CUDA", why),))
    found: list[Candidate] = []
    skipped: list[Skipped] = []
    batch = _expected(case)
    if case.wants("fp32"):
        found.append(_candidate(_ON_CUDA, "fp32", _CUDA_PRIORS["fp32"], batch=batch))
    for precision, least in _HALF_FROM.items():
        if not case.wants(precision) or capability < least or not _products(case):
            continue
        for channels_last in _layouts(case):
            prior = _CUDA_PRIORS[precision]
            found.append(_candidate(_ON_CUDA, precision, prior, channels_last=channels_last, batch=batch))
    if case.wants("fp8"):
        why = _why_no_fp8(case, capability)
        if why is None:
            found.append(_fp8(case))
        elif case.spec.precisions is not None:
            skipped.append(Skipped("tic-fp8", why))
    return Proposal(tuple(found), tuple(skipped))


def _fp8(case: Case) -> Candidate:
    """The program calibrated, and compiled with its matrix products in float8, the rest in fp16."""
    prior, last = _CUDA_PRIORS["fp8"], _layouts(case)[0]
    plain = _candidate(_ON_CUDA, "fp16", prior, channels_last=last, batch=_expected(case))
    calibration = recipes.calibration_options(case)
    calibration["max_samples"] = min(calibration["max_samples"], _FP8_SAMPLES)
    step = Step("observe", calibration, ("calibration",))
    name = "Torch Inductor CUDA, products in fp8, fp16"
    cid = f"{_ON_CUDA.prefix}-fp8"
    return replace(plain, id=cid, name=name, precision="fp8", steps=(step,), rest="fp16")


def _why_no_fp8(case: Case, capability: float) -> str | None:
    if capability < FP8_FROM:
        return f"the GPU has no float8 products (compute capability {capability}; they need {FP8_FROM})"
    if case.quantized or not case.has("MatMul", "Gemm", "Attention"):
        return "the model has no float32 matrix products to convert"
    if not case.has_calibration:
        return "static fp8 needs calibration data"
    if case.spec.quantization.keep_nodes:
        return "nodes that the job keeps in higher precision have no names in an exported program"
    return None


def variants_cpu(case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
    if case.cores < 2:
        return ()
    return (candidate.variant("t1", "1 thread", recipes.why_not_one_thread(case), threads=1),)


def variants_cuda(candidate: Candidate) -> tuple[Candidate, ...]:
    return (candidate.variant("graph", "CUDA graph", cuda_graph=True),)


def _why_not(case: Case) -> str | None:
    if EXPORTED_PROGRAM not in case.kinds:
        return only_for_programs(case)
    if not case.hardware.get("cxx"):
        return "Inductor compiles with a C++ compiler (g++), and this worker has none"
    if case.spec.budget_seconds < LEAST_BUDGET_S:
        return (
            f"compiling takes up to a minute, and the budget is {case.spec.budget_seconds} s; give {LEAST_BUDGET_S} "
            "or more"
        )
    return None


def _layouts(case: Case) -> tuple[bool, ...]:
    """Whether convolutions are laid out with channels last, the likelier first. Inductor chooses by itself only where
    the batch size is fixed. Where they are most of the products it paid (ResNet-50, EfficientNet-B0); where they are
    few (the patches of a ViT) there is little to gain; between, a job measures both."""
    convolutions, products = (sum(case.ops.get(op, 0) for op in ops) for ops in _KINDS_OF_PRODUCTS)
    if 10 * convolutions <= products:
        return (False,)
    return (True,) if convolutions > products else (True, False)


def _products(case: Case) -> bool:
    return not case.quantized and bool(case.has("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention"))


def _expected(case: Case) -> int:
    """The largest batch that the job measures, where a kernel laid out for another size costs the most time; sizes of
    0 and 1 have code of their own."""
    return max(2, min(max(case.spec.benchmark.batch_sizes), _MOST_EXPECTED))


def _candidate(
    place: _Place, precision: str, prior: float, *, channels_last: bool = False, batch: int | None = None
) -> Candidate:
    layout = ", channels last" if channels_last else ""
    return Candidate(
        f"{place.prefix}-{precision}{'-nhwc' if channels_last else ''}",
        f"Torch Inductor {place.words}{precision}{layout}",
        place.backend,
        precision,
        (),
        build_options={
            "precision": precision,
            **({"channels_last": True} if channels_last else {}),
            **({} if batch is None else {"batch": batch}),
        },
        lossless=precision == "fp32",
        prior=prior,
        options_gain=place.options_gain,
    )
