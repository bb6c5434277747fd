"""What OpenVINO is worth trying with, by model kind and instruction set. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers import recipes
from workers.candidates import Candidate, Case, Narrowing, Proposal, Skipped, Step

_NAME = "openvino"
# Values beyond int32 are cut to their lower 32 bits; Mod, Div, comparisons and sums were seen in float32, and int8 and
# uint8 arithmetic that saturates where it should wrap.
ARITHMETIC = Narrowing("float32", "int32, or in float32", "OpenVINO 2026.4.1, CPU")


@dataclass(frozen=True)
class _Form:
    """One of the forms that a model is tried in. `rest`: what is not quantized computes in; `place`: of its figure in
    a row of `_PRIORS`."""

    id: str
    name: str
    precision: str
    rest: str
    place: int


_FP32 = _Form("ov-fp32", "fp32", "fp32", "fp32", 0)
_BF16 = _Form("ov-bf16", "bf16", "bf16", "bf16", 1)
_INT8 = _Form("ov-int8", "NNCF int8", "int8", "fp32", 2)
_INT8_BF16 = _Form("ov-int8-bf16", "NNCF int8, rest in bf16", "int8", "bf16", 3)
# Expected p50 over ONNX Runtime's fp32 default, by kind: fp32, bf16, int8 (rest in fp32), int8 (rest in bf16). Measured
# at batch 1 on x86 with VNNI and BF16 (docs/backends.md).
_PRIORS = {
    "cnn": (1.0, 0.55, 0.42, 0.4),
    "transformer": (0.92, 0.5, 0.36, 0.33),
    "rnn": (1.15, 0.63, 1.1, 0.65),
    "other": (1.05, 0.7, 0.6, 0.6),
}
_COMPUTES = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's own names
# A call of a small model takes well under a millisecond, most of which is OpenVINO's fixed cost.
_SMALL_FACTOR = {"fp32": 1.4, "bf16": 1.9, "int8": 2.5}
# NNCF's own default; statistics of further samples cost an inference each and move little.
_MAX_CALIBRATION_SAMPLES = 300


def propose(case: Case) -> Proposal:
    """fp32 is pinned: left alone, OpenVINO computes in bf16 where the processor can."""
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    plain = (recipes.simplify(),)
    if case.wants("fp32"):
        candidates.append(_candidate(case, _FP32, plain, lossless=True))
    if case.wants("bf16"):
        if case.bf16_pays:
            candidates.append(_candidate(case, _BF16, plain))
        else:
            skipped.append(Skipped(_BF16.id, "the processor has no bf16 instructions"))
    if case.wants("int8"):
        reason = _no_int8(case)
        if reason:
            skipped.append(Skipped(_INT8.id, reason))
        else:
            steps = (*plain, nncf_int8(case))
            candidates.append(_candidate(case, _INT8, steps))
            if case.bf16_pays and case.wants("bf16"):
                candidates.append(_candidate(case, _INT8_BF16, steps))
    return Proposal(tuple(candidates), tuple(skipped))


def variants(case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
    """By how often they win: free threads beat pinned ones wherever something else runs, one thread wins on small
    models, and both logical processors of a core sometimes where there are any. Streams serve parallel requests and
    cannot make one request faster: for throughput, instances share the machine (`with_threads`)."""
    if case.cores < 2:
        return ()
    free = candidate.variant("nopin", "threads not pinned", enable_cpu_pinning=False)
    single = candidate.variant("t1", "1 thread", recipes.why_not_one_thread(case), inference_num_threads=1)
    found = [single, free] if recipes.is_small(case) else [free, single]
    if _has_siblings(case.hardware):
        found.append(candidate.variant("ht", "all logical processors", enable_hyper_threading=True))
    return tuple(found)


def nncf_int8(case: Case, *, method: str | None = None) -> Step:
    """NNCF's post-training quantization: 8-bit symmetric weights per channel; activations symmetric, or asymmetric in
    transformers, whose sensitive patterns NNCF knows by the model type."""
    assert case.spec.calibration is not None
    transformer = case.kind == "transformer"
    options = recipes.calibration_options(case)
    options["max_samples"] = min(options["max_samples"], _MAX_CALIBRATION_SAMPLES)
    return Step(
        "quantize_nncf",
        {
            "preset": "mixed" if transformer else "performance",
            "model_type": "transformer" if transformer else None,
            "method": method or _METHODS.get(recipes.calibration_method(case), "minmax"),
            **options,
            **recipes.kept_nodes(case),
        },
        ("calibration",),
    )


# NNCF has no entropy calibration; its histogram method, like it, gives up rare large values to round the others less.
# Its own default ("auto", the mean of the samples' extremes) lost up to twenty times the accuracy of the true extremes.
_METHODS = {"minmax": "minmax", "percentile": "percentile", "entropy": "histogram", "mse": "histogram"}


def _no_int8(case: Case) -> str | None:
    if case.quantized:
        return "the model is quantized already"
    if not case.has_calibration:
        return "NNCF int8 needs calibration data"
    if case.kind == "rnn":
        return "recurrent layers stay in floating point, so int8 gains nothing"
    if not case.has("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return "no operator that int8 speeds up"
    return None


def _has_siblings(hardware: Mapping[str, Any]) -> bool:
    physical, logical = hardware.get("cores_physical"), hardware.get("cores_machine")
    return bool(physical and logical and logical > physical)


def _candidate(case: Case, form: _Form, steps: tuple[Step, ...], *, lossless: bool = False) -> Candidate:
    prior = _PRIORS.get(case.kind, _PRIORS["other"])[form.place]
    if form.precision == "int8" and not case.int8_pays:
        prior = max(prior, 0.9)
    if recipes.is_small(case):
        prior = round(prior * _SMALL_FACTOR[form.precision], 2)
    narrows = ARITHMETIC.of(case)
    return Candidate(
        form.id,
        f"OpenVINO {form.name}",
        _NAME,
        form.precision,
        steps,
        runtime={"inference_precision": _COMPUTES[form.rest]},
        lossless=lossless and narrows is None,
        prior=prior,
        narrows=narrows,
        rest=form.rest,
    )
