"""What a program would bring where only its ONNX form was uploaded: figures of models of the same class, and where they
are from. They were measured by this service's own benchmarks, none of them in the job whose report they stand in."""

from __future__ import annotations

from dataclasses import dataclass

from workers.candidates import Case
from workers.devices.cuda import compute_capability


@dataclass(frozen=True)
class Compared:
    """`ours`, `theirs`: ms of Inductor's fastest engine and of the fastest of its ONNX form, by batch size."""

    model: str
    ours: dict[int, float]
    theirs: dict[int, float]

    def told(self) -> str:
        at = [f"{ours:g} ms to {self.theirs[b]:g} at batch {b}" for b, ours in self.ours.items()]
        return f"{self.model} {', '.join(at)}"


@dataclass(frozen=True)
class Measured:
    """By class of model (`Case.kind`). `on`: what with; `source`: where the figures stand."""

    on: str
    source: str
    by_kind: dict[str, tuple[Compared, ...]]


ON_HOPPER = Measured(
    "fp16 with CUDA graphs, beside the best of ONNX Runtime's CUDA provider in one run on an NVIDIA H200",
    "docs/gpu-figures.md",
    {
        "cnn": (
            Compared("ResNet-50", {1: 0.355, 32: 1.278}, {1: 0.518, 32: 2.92}),
            Compared("EfficientNet-B0", {1: 0.412, 32: 1.253}, {1: 0.65, 32: 3.193}),
        ),
        "transformer": (
            Compared("ViT-B/16", {1: 0.467, 32: 2.659}, {1: 0.714, 32: 3.336}),
            Compared("BERT-base", {1: 0.447, 32: 1.718}, {1: 0.606, 32: 2.042}),
        ),
    },
)
ON_A_CPU = Measured(
    "fp32 on two cores with AVX2, where Inductor was the slower one; not measured in bf16",
    "docs/figures.md",
    {
        "cnn": (Compared("MobileNetV2", {1: 18.4, 8: 134.0}, {1: 8.9, 8: 61.0}),),
        "transformer": (Compared("a MiniLM-size encoder", {1: 22.1, 8: 173.0}, {1: 14.2, 8: 103.0}),),
    },
)
_IN_A_CHAIN = (
    "only for a .pt2 by itself: the models of a chain become one ONNX graph before anything is tried, those uploaded "
    "as .pt2, too. A job of such a model alone has it compiled."
)
_HOPPER = 9.0  # compute capability


def only_for_programs(case: Case, *, here: bool = True) -> str:
    """Why there is no candidate for an ONNX upload, and what a program would bring; or for a chain. `here`: whether
    this worker could compile a program."""
    if case.spec.chain is not None:
        return _IN_A_CHAIN
    half = "fp16 and bf16" if case.hardware.get("gpu") else "bf16" if case.bf16_pays else None
    gains = f", in fp32 and {half}" if half else ", in fp32"
    able = "would be compiled for this machine, too" if here else "would be compiled by a worker that has PyTorch"
    return (
        "only for .pt2: an ONNX file holds no program that Inductor could compile. Uploaded as torch.export.save "
        f"writes it, the same model {able}{gains}. {_figures(case)}"
    )


def _figures(case: Case) -> str:
    measured = ON_A_CPU
    if case.hardware.get("gpu"):
        if compute_capability(case.hardware) != _HOPPER:
            return "What that brings on this kind of GPU was not measured."
        measured = ON_HOPPER
    found = measured.by_kind.get(case.kind, ())
    if not found:
        return "What that brings was not measured for models of this class."
    told = "; ".join(c.told() for c in found)
    return f"Measured elsewhere, not in this job ({measured.on}; {measured.source}): {told}."
