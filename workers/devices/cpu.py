"""The machine's own processor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from workers.candidates import BF16_FLAGS, INT8_FLAGS, Case
from workers.devices.accelerator import Accelerator, Hardware


class Cpu(Accelerator):
    name: ClassVar[str] = "cpu"
    baseline_backend: ClassVar[str] = "onnxruntime"
    # A machine whose speed drifts further (clocks, a neighbour on the same memory) was not one machine meanwhile. Hosts
    # that are fast and slow in turns drift by a third without company, which the rounds' ratios cancel.
    most_drift: ClassVar[float] = 1.5
    most_wide: ClassVar[float] = 1.2
    reads_machine_memory: ClassVar[bool] = True
    int8_activations: ClassVar[Literal["uint8", "int8"]] = "uint8"
    triton_group: ClassVar[str] = "KIND_CPU"

    def label(self, hardware: Hardware) -> str | None:
        return str(hardware.get("cpu_model") or "") or None

    def lock(self, hardware: Hardware) -> str | None:  # noqa: ARG002
        return None

    def memory_bytes(self, hardware: Hardware, limit: float) -> float:  # noqa: ARG002
        return limit

    def wanted(self, hardware: Hardware, case: Case) -> Iterator[str]:
        isa, model = set(hardware.get("isa") or ()), self.label(hardware)
        if not isa & INT8_FLAGS and case.wants("int8"):
            yield (
                "Try a machine with VNNI or AMX (x86) or dot-product instructions (Arm) for int8: this one "
                f"({model}) has none."
            )
        if not isa & BF16_FLAGS and case.wants("bf16"):
            yield f"Try a machine with AVX512-BF16 or AMX for bf16: this one ({model}) has neither."
