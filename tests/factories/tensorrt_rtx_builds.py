"""Importing this module has the real builder of TensorRT for RTX write down what each plan is made of, so that the
stand-in for a GPU can run it. The plan is the real one. The second build of a worker hangs: for tests that take its
life then."""

from __future__ import annotations

import time
from typing import Any

from tests.factories import tensorrt_rtx_standin as standin
from workers.backends.tensorrt import build as building
from workers.backends.tensorrt import profiles

_make_plan = building.make_plan


def _make(state: building.Building, model: Any, *arguments: Any) -> building.Made:
    if standin.any_written_down():
        time.sleep(120)
    made = _make_plan(state, model, *arguments)
    standin.write_down(bytes(memoryview(made.plan)), model / "model.onnx", profiles.to_json(made.wanted))
    return made


building.make_plan = _make
