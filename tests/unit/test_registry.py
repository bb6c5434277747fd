"""What registers itself: a backend of another package changes nothing about those that are built in."""

from __future__ import annotations

import subprocess
import sys

_STRANGER = """
from typing import ClassVar
from workers.kernel import Backend, backends, runner_of
from workers.registry import AlreadyRegistered

class Stranger(Backend):
    name: ClassVar[str] = "stranger"
    engine_format: ClassVar[str] = "onnx"
    reference: ClassVar[bool] = {reference}
    def probe(self, hardware): ...
    def propose(self, case): ...
    def variants(self, case, candidate): ...
    def with_threads(self, runtime, threads): ...
    def build(self, model, out, options, reporter): ...
    def load(self, engine, runtime): ...
    def infer_script(self, runtime): ...

try:
    print(*backends())
    print(runner_of("onnx").name, runner_of("openvino-ir").name)
except AlreadyRegistered as refused:
    print("refused:", refused)
"""


def _printed(*, reference: bool) -> str:
    code = _STRANGER.format(reference=reference)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_graphs_are_tried_with_the_reference_whoever_registered_first() -> None:
    names, runners = _printed(reference=False).splitlines()
    assert names.split()[0] == "stranger"
    assert runners == "onnxruntime openvino"


def test_one_kind_of_artifact_has_one_reference() -> None:
    assert _printed(reference=True).startswith("refused: 'stranger' is already the reference for 'onnx'")
