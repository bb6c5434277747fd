"""Models of Keras and TensorFlow, where tf2onnx still carries them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import hold_against, need, run_onnx
from anneal_client.prepared import ExportedModel


def from_tensorflow(
    model: Any, example: Any, *, name: str | None = None, opset: int = 17, tolerance: float | None = None
) -> ExportedModel:
    """A Keras model, or the folder of a SavedModel, by tf2onnx, held against itself.

    `example`: one array, or arrays by input. The first axis is the batch. tf2onnx is hardly kept up any more: what it
    does not take with the TensorFlow that is installed is refused with its own words. Needs the extra `tensorflow`.
    Raises `ConversionFailed`.
    """
    import numpy as np

    tf, tf2onnx = need("tensorflow", "tensorflow"), need("tf2onnx", "tensorflow")
    call, names = _callable(tf, model, example)
    arrays = dict(example) if isinstance(example, dict) else {names[0]: example}
    tensors = {n: tf.constant(np.asarray(arrays[n])) for n in names}
    signature = [tf.TensorSpec([None, *t.shape[1:]], t.dtype, name=n) for n, t in tensors.items()]
    function = tf.function(lambda *args: call(dict(zip(names, args, strict=True))), input_signature=signature)
    stem = name or (Path(model).name if isinstance(model, str | os.PathLike) else getattr(model, "name", "model"))
    exported = ExportedModel(f"{stem}.onnx")
    try:
        onnx_model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=opset)
    except Exception as refused:  # tf2onnx raises whatever it comes upon
        raise ConversionFailed(
            "export_failed",
            f"tf2onnx {tf2onnx.__version__} does not convert it with TensorFlow {tf.__version__}: "
            f"{type(refused).__name__}: {str(refused).strip()[:1000]}",
            remedy="Keras 3 models run on torch, too: KERAS_BACKEND=torch, and from_torch(model, example).",
        ) from refused
    exported.path.write_bytes(onnx_model.SerializeToString())
    wanted = [np.asarray(t) for t in tf.nest.flatten(call(tensors))]
    outputs = run_onnx(exported.path, {n: np.asarray(t) for n, t in tensors.items()})
    hold_against(exported, wanted, None if outputs is None else list(outputs.values()), tolerance)
    return exported


def _callable(tf: Any, model: Any, example: Any) -> tuple[Any, list[str]]:
    """What computes arrays by name, and the names in their order."""
    if isinstance(model, str | os.PathLike):
        loaded = tf.saved_model.load(os.fspath(model))
        served = loaded.signatures.get("serving_default")
        if served is None:
            detail = f"The SavedModel has the signatures {', '.join(loaded.signatures) or 'none'}, not serving_default."
            raise ConversionFailed("no_signature", detail, remedy="Save it with signatures={'serving_default': ...}.")
        return lambda feeds: served(**feeds), list(served.structured_input_signature[1])
    names = list(example) if isinstance(example, dict) else [i.name.split(":")[0] for i in getattr(model, "inputs", [])]
    if not names:
        names = ["x"]
    return lambda feeds: model(feeds if len(names) > 1 else feeds[names[0]], training=False), names
