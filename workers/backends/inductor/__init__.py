"""Torch Inductor on CPUs and NVIDIA GPUs: exported programs compiled to native code, with a signed sidecar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from workers.artifacts import EXPORTED_PROGRAM, INDUCTOR_PACKAGE
from workers.backends.bundle_script import HURRY
from workers.backends.inductor import build as building
from workers.backends.inductor import recipes as inductor_recipes
from workers.backends.inductor.library import facts_of, library, torch_version
from workers.backends.inductor.options import BuildOptions, RuntimeOptions
from workers.backends.inductor.script import infer_script
from workers.backends.inductor.session import load_session
from workers.backends.options import parsed
from workers.candidates import BF16_FLAGS, Candidate, Case, Proposal, Skipped
from workers.devices.cuda import compute_capability
from workers.devices.cuda import runtime as cuda_runtime
from workers.kernel import Backend, BackendInfo, Reporter, Session

_WHOSE = "Torch Inductor"


class _Inductor(Backend):
    """Engine = AOTInductor's package, or the program and Inductor's cache; and `engine.json`, which is signed."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    accepts: ClassVar[tuple[str, ...]] = (EXPORTED_PROGRAM,)
    engine_format: ClassVar[str] = INDUCTOR_PACKAGE
    signed: ClassVar[bool] = True
    uses_tmp: ClassVar[bool] = True
    script_libraries: ClassVar[tuple[str, ...]] = ("torch",)
    script_hurry: ClassVar[tuple[str, ...]] = HURRY

    @classmethod
    def facts_of_build(cls, hardware: Mapping[str, Any]) -> Mapping[str, Any]:
        return facts_of(hardware)

    def import_library(self) -> None:
        library()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return {**runtime, "threads": threads}

    def build(
        self,
        model: Path,
        out: Path,
        options: Mapping[str, Any],
        reporter: Reporter,
        kind: str = EXPORTED_PROGRAM,  # noqa: ARG002  (the one that it accepts)
    ) -> dict[str, Any]:
        """`options`: `BuildOptions`; the failures and what is returned are `building.build`'s."""
        return building.build(model, out, parsed(BuildOptions, options, _WHOSE), self.device, reporter)

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Verify, then load; the failures are `load_session`'s, and `invalid_backend_options`."""
        return load_session(engine, parsed(RuntimeOptions, runtime, _WHOSE), self.device)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return infer_script(runtime, self.device, torch_version() or "any version")


class InductorBackend(_Inductor):
    """On the machine's own processor."""

    name: ClassVar[str] = "inductor"

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        """None where torch is not installed. Does not import it: the caller may fork, and shares no torch with the
        engines that are measured."""
        version = torch_version()
        if version is None:
            return None
        pays = bool(set(hardware.get("isa") or ()) & BF16_FLAGS)
        return BackendInfo(self.name, {"torch": version}, ("cpu",), ("fp32", "bf16") if pays else ("fp32",))

    def propose(self, case: Case) -> Proposal:
        return inductor_recipes.propose_cpu(case)

    def lacking(self, case: Case) -> Sequence[Skipped]:
        return inductor_recipes.lacking(case)

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return inductor_recipes.variants_cpu(case, candidate)


class InductorCudaBackend(_Inductor):
    """On an NVIDIA GPU."""

    name: ClassVar[str] = "inductor-cuda"
    device: ClassVar[str] = "cuda"

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        """None where torch is not installed or was built without CUDA, or there is no usable GPU."""
        version = torch_version()
        if version is None or version.endswith("+cpu") or not cuda_runtime.available():
            return None
        capability = compute_capability(hardware)
        half = ("fp16", "bf16") if capability >= 8.0 else ("fp16",)
        fp8 = ("fp8",) if capability >= inductor_recipes.FP8_FROM else ()
        return BackendInfo(self.name, {"torch": version}, ("cuda",), ("fp32", *half, *fp8))

    def propose(self, case: Case) -> Proposal:
        return inductor_recipes.propose_cuda(case, compute_capability(case.hardware))

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:  # noqa: ARG002
        return inductor_recipes.variants_cuda(candidate)

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:  # noqa: ARG002
        """As it is: the work does not run on CPU threads."""
        return dict(runtime)
