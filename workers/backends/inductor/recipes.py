"""What Inductor is worth trying with. Pure."""

from __future__ import annotations

from workers import recipes
from workers.artifacts import EXPORTED_PROGRAM
from workers.candidates import Candidate, Case, Proposal, Skipped

# Expected p50 over ONNX Runtime's fp32 default, by kind: fp32, bf16. Guesses beside OpenVINO's measured ones; they
# decide the order of trying and nothing else.
_CPU_PRIORS = {"cnn": (1.0, 0.6), "transformer": (1.0, 0.6), "rnn": (1.2, 1.0), "other": (1.0, 0.8)}
# Over the CUDA provider's fp32, whose own fp16 is at 0.4. On one H200 `torch.compile` with a CUDA graph took 0.46 to
# 0.70 of the best that other libraries took in fp16 (ResNet-50, ViT-B/16).
_CUDA_PRIORS = {"fp32": 0.9, "bf16": 0.3, "fp16": 0.28}
# Compiling takes a minute of a small budget, in which several other engines are built and timed.
LEAST_BUDGET_S = 60
_HALF_FROM = {"fp16": 7.0, "bf16": 8.0}  # compute capability


def propose_cpu(case: Case) -> Proposal:
    why = _why_not(case)
    if why is not None:
        return Proposal(skipped=(Skipped("Torch Inductor", why),))
    candidates, skipped = [], []
    fp32, bf16 = _CPU_PRIORS.get(case.kind, _CPU_PRIORS["other"])
    if case.wants("fp32"):
        candidates.append(_candidate("inductor", "ti-fp32", "fp32", fp32))
    if case.wants("bf16"):
        if not case.bf16_pays:
            skipped.append(Skipped("ti-bf16", "the processor has no bf16 instructions"))
        elif not _products(case):
            skipped.append(Skipped("ti-bf16", "the model has no float32 products to convert"))
        else:
            candidates.append(_candidate("inductor", "ti-bf16", "bf16", bf16))
    return Proposal(tuple(candidates), tuple(skipped))


def propose_cuda(case: Case, capability: float) -> Proposal:
    if case.spec.target.device == "cpu":
        return Proposal()
    why = _why_not(case)
    if why is not None:
        return Proposal(skipped=(Skipped("Torch Inductor on CUDA", why),))
    found = []
    if case.wants("fp32"):
        found.append(_candidate("inductor-cuda", "tic-fp32", "fp32", _CUDA_PRIORS["fp32"]))
    for precision, least in _HALF_FROM.items():
        if not case.wants(precision) or capability < least or not _products(case):
            continue
        prior = _CUDA_PRIORS[precision]
        found.append(_candidate("inductor-cuda", f"tic-{precision}", precision, prior))
        if case.kind == "cnn":
            found.append(_candidate("inductor-cuda", f"tic-{precision}-nhwc", precision, prior, channels_last=True))
    return Proposal(tuple(found))


def variants_cpu(case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
    if case.cores < 2:
        return ()
    return (candidate.variant("t1", "1 thread", recipes.why_not_one_thread(case), threads=1),)


def variants_cuda(candidate: Candidate) -> tuple[Candidate, ...]:
    return (candidate.variant("graph", "CUDA graph", cuda_graph=True),)


def _why_not(case: Case) -> str | None:
    if EXPORTED_PROGRAM not in case.kinds:
        half = "fp16 and bf16" if case.hardware.get("gpu") else "bf16" if case.bf16_pays else None
        gains = f", in fp32 and {half}" if half else ""
        return (
            "only for .pt2: an ONNX file holds no program that Inductor could compile. Uploaded as "
            f"torch.export.save writes it, the same model would be compiled for this machine, too{gains}"
        )
    if not case.hardware.get("cxx"):
        return "Inductor compiles with a C++ compiler (g++), and this worker has none"
    if case.spec.budget_seconds < LEAST_BUDGET_S:
        return (
            f"compiling takes up to a minute, and the budget is {case.spec.budget_seconds} s; give {LEAST_BUDGET_S} "
            "or more"
        )
    return None


def _products(case: Case) -> bool:
    return not case.quantized and bool(case.has("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention"))


def _candidate(backend: str, cid: str, precision: str, prior: float, *, channels_last: bool = False) -> Candidate:
    where = "CUDA, " if backend.endswith("cuda") else ""
    layout = ", channels last" if channels_last else ""
    return Candidate(
        cid,
        f"Torch Inductor {where}{precision}{layout}",
        backend,
        precision,
        (),
        build_options={"precision": precision, **({"channels_last": True} if channels_last else {})},
        lossless=precision == "fp32",
        prior=prior,
        # Its own rule lays convolutions out so wherever that paid in its measurements.
        unlikely="Inductor chooses channels last by itself where it expects a gain" if channels_last else None,
    )
