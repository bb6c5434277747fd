"""Importing this module puts an L4 and TensorRT for RTX (the stand-in's) in place of what is here: what
`IsolatedRunner` is given, so that the children of stage calls have them."""

from __future__ import annotations

import sys

import tests.factories.tensorrt_installed  # noqa: F401  (the CUDA layer, and a baseline)
from tests.factories import tensorrt_rtx_standin as standin
from workers.backends.tensorrt import probe as trt_probe
from workers.backends.tensorrt.library import RTX, TENSORRT

sys.modules.pop(TENSORRT.module)
sys.modules[RTX.module] = standin.module()
trt_probe.ask_driver = lambda: dict(standin.GPU)
trt_probe.probe_gpu.cache_clear()
