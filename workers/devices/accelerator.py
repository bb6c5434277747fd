"""The contract of a kind of device that engines run on: all that differs by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from workers.candidates import Case

Hardware = Mapping[str, Any]  # `workers.hardware.describe()`


class Accelerator(ABC):
    """One module each in `workers/devices`; nothing else asks which one it is.

    `name`: as a spec's `target.device` and a backend's `device` name it. `baseline_backend`: runs the original as its
    owner would run it there. `most_drift`: of the baseline's median windows, third quartile over first, beyond which
    nothing is claimed. `most_wide`: likewise of the interval of the baseline against itself, high over low; at 1.3 a
    figure is off by 14 % at most. `tells_parts`: sessions tell transfers, compute and submission apart
    (`kernel.Session.profile`). `reads_machine_memory`: weights are read from the machine's own memory, whose bandwidth
    is measured. `int8_activations`: as its kernels take them: with a zero point, or symmetric. `triton_group`: what
    Triton calls instances of a model that run there; `pod_resource`: what a pod of Kubernetes asks for to have one.
    """

    name: ClassVar[str]
    baseline_backend: ClassVar[str]
    most_drift: ClassVar[float]
    most_wide: ClassVar[float]
    tells_parts: ClassVar[bool] = False
    reads_machine_memory: ClassVar[bool] = False
    int8_activations: ClassVar[Literal["uint8", "int8"]]
    triton_group: ClassVar[str]
    pod_resource: ClassVar[str | None] = None

    @abstractmethod
    def label(self, hardware: Hardware) -> str | None:
        """What people call this machine's device; None where it is not known."""

    @abstractmethod
    def lock(self, hardware: Hardware) -> str | None:
        """The name of the lock that builds and measurements on the device take beside the machine's; None where the
        device is the machine."""

    @abstractmethod
    def memory_bytes(self, hardware: Hardware, limit: float) -> float:
        """For loaded engines; `limit`: of the worker's own memory."""

    @abstractmethod
    def wanted(self, hardware: Hardware, case: Case) -> Iterator[str]:
        """Advice: what another machine's device of this kind would have for precisions that this one does not gain
        by."""

    def kind(self, hardware: Hardware) -> str | None:  # noqa: ARG002
        """Of this machine's device, as jobs may ask for it (`target.compute_capability`) and engines be built for it
        elsewhere; None where jobs do not."""
        return None

    def facts_of_speed(self, hardware: Hardware) -> dict[str, Any]:  # noqa: ARG002
        """What decides an engine's speed beside the processor, for the machine's fingerprint."""
        return {}

    def device_files(self, hardware: Hardware) -> Sequence[str]:  # noqa: ARG002
        """What a process opens to use this machine's device."""
        return ()

    def conditions(self, hardware: Hardware) -> dict[str, Any]:  # noqa: ARG002
        """What could explain a difference between two measurements beside the processor's state, as it stands now."""
        return {}

    def memory_used_mb(self, hardware: Hardware) -> float | None:  # noqa: ARG002
        """Memory of the device in use, of all processes, in MB (10⁶ bytes); None where it has none of its own, or
        nothing tells."""
        return None

    def reading(self, hardware: Hardware) -> dict[str, float]:  # noqa: ARG002
        """Of the device as it stands now, for the worker's metrics: `memory_used_bytes`, `utilization_ratio`,
        `temperature_celsius`, as far as it tells them within some milliseconds."""
        return {}

    def company(self, hardware: Hardware) -> Callable[[], str | None] | None:  # noqa: ARG002
        """Watches the device from now on: each call says what disturbed it since the last one, or None. None where the
        machine's own watch sees it all, or nothing tells."""
        return None
