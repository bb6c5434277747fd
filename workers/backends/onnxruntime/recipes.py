"""What ONNX Runtime's CPU backend is worth trying with, by model kind and instruction set. Pure."""

from __future__ import annotations

from workers import recipes
from workers.candidates import Candidate, Case, Proposal, Skipped, Step

_NAME = "onnxruntime"


def propose(case: Case) -> Proposal:
    """Priors: p50 over ONNX Runtime's fp32 default, batch 1, on x86 with VNNI (docs/search.md)."""
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    if case.wants("fp32"):
        plain = recipes.simplify()
        candidates.append(_candidate("ort-fp32", "simplified fp32", "fp32", [plain], lossless=True, prior=1.0))
        if case.kind == "transformer":
            fused = recipes.simplify(fusions=True)
            name = "fp32, transformer fusions"
            candidates.append(_candidate("ort-fp32-fused", name, "fp32", [fused], lossless=True, prior=0.98))
    if case.wants("int8"):
        _int8(case, candidates, skipped)
    return Proposal(tuple(candidates), tuple(skipped))


def variants(case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
    """By how often they win. ONNX Runtime's default is one thread per core, spinning, with an arena.

    One thread wins on small models, sleeping threads where the worker has less CPU time than cores; without its arena
    the session holds less memory, which is worth a try only where memory is limited. Recurrent nets decay into denormal
    numbers."""
    found = []
    if case.cores > 1:
        found.append(candidate.variant("t1", "1 thread", recipes.why_not_one_thread(case), intra_op_num_threads=1))
        shared = (case.hardware.get("cpu_quota") or case.cores) < case.cores
        why_not = None if shared else "threads that sleep wake up late, and the worker has its cores for itself"
        found.append(candidate.variant("nospin", "no spinning", why_not, allow_spinning=False))
    if case.kind == "rnn":
        found.append(candidate.variant("daz", "denormals as zero", other_values=True, denormal_as_zero=True))
    if case.spec.constraints.max_memory_mb is not None:
        found.append(candidate.variant("noarena", "no memory arena", enable_cpu_mem_arena=False))
    return tuple(found)


def _int8(case: Case, candidates: list[Candidate], skipped: list[Skipped]) -> None:
    if case.quantized:
        skipped.append(Skipped("ort-int8", "the model is quantized already"))
        return
    dynamic = case.has(*recipes.DYNAMIC_OPS)
    mostly_conv = case.kind == "cnn"
    if dynamic and not mostly_conv:
        steps = [recipes.simplify(), recipes.dynamic_int8(case, dynamic)]
        prior = 0.4 if case.int8_pays else 0.9
        candidates.append(_candidate("ort-int8-dynamic", "dynamic int8", "int8", steps, prior=prior))
        # One scale per channel costs the LSTM kernel a tenth, and each product about a microsecond, which is nothing in
        # a transformer, where it saves accuracy.
        if case.kind != "transformer":
            whole = [recipes.simplify(), recipes.dynamic_int8(case, dynamic, per_channel=False)]
            name = "dynamic int8, one scale per weight"
            candidates.append(_candidate("ort-int8-dynamic-tensor", name, "int8", whole, prior=prior))
    else:
        reason = (
            "convolutions run slower with dynamic int8" if mostly_conv else "no operator that dynamic int8 speeds up"
        )
        skipped.append(Skipped("ort-int8-dynamic", reason))
    if not case.has_calibration:
        skipped.append(Skipped("ort-int8-static", "static int8 needs calibration data"))
    elif not case.has("Conv", "MatMul", "Gemm") or not recipes.static_ops(case):  # e.g. convolutions around an LSTM
        skipped.append(Skipped("ort-int8-static", "no operator that static int8 speeds up"))
    else:
        steps = [recipes.simplify(), recipes.static_int8(case, recipes.static_ops(case))]
        name = f"static int8 QDQ, {recipes.calibration_method(case)} calibration"
        prior = (0.4 if mostly_conv else 0.5) if case.int8_pays else 0.95
        candidates.append(_candidate("ort-int8-static", name, "int8", steps, prior=prior))


def _candidate(
    cid: str, name: str, precision: str, steps: list[Step], *, lossless: bool = False, prior: float
) -> Candidate:
    return Candidate(cid, name, _NAME, precision, tuple(steps), lossless=lossless, prior=prior)
