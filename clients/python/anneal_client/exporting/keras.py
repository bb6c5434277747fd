"""Models of Keras and TensorFlow, where tf2onnx still carries them."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    arrays = example if isinstance(example, Mapping) else {names[0]: example}
    if sorted(arrays) != sorted(names):
        detail = f"The model takes {', '.join(names)}; the example has {', '.join(arrays)}."
        raise ConversionFailed("wrong_inputs", detail, remedy="Give an array for each input, by its name.")
    tensors = {n: tf.constant(np.asarray(arrays[n])) for n in names}
    signature = [tf.TensorSpec([None, *t.shape[1:]], t.dtype, name=n) for n, t in tensors.items()]

    def computed(*values: Any) -> dict[str, Any]:
        return _named(call(dict(zip(names, values, strict=True))))

    stem = name or (Path(model).name if isinstance(model, str | os.PathLike) else getattr(model, "name", "model"))
    exported = ExportedModel(f"{stem}.onnx")
    try:
        function = tf.function(computed, input_signature=signature)
        onnx_model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=opset)
    except Exception as refused:  # tf2onnx raises whatever it comes upon
        raise ConversionFailed(
            "export_failed",
            f"tf2onnx {tf2onnx.__version__} does not convert it with TensorFlow {tf.__version__}: "
            f"{type(refused).__name__}: {str(refused).strip()[:1000]}",
            remedy="Keras 3 models run on torch, too: KERAS_BACKEND=torch, and from_torch(model, example).",
        ) from refused
    _name_batch(onnx_model)
    exported.path.write_bytes(onnx_model.SerializeToString())
    wanted = {n: np.asarray(t) for n, t in computed(*tensors.values()).items()}
    outputs = run_onnx(exported.path, {n: np.asarray(t) for n, t in tensors.items()})
    found = None if outputs is None else [outputs[n] for n in wanted if n in outputs]
    hold_against(exported, list(wanted.values()), found, tolerance)
    return exported


def _named(answer: Any) -> dict[str, Any]:
    """The outputs by name: of a dict its own, else `output`, or `output_0`, `output_1` …"""
    if isinstance(answer, Mapping):
        return dict(answer)
    if isinstance(answer, tuple | list):
        return {f"output_{place}": value for place, value in enumerate(answer)}
    return {"output": answer}


def _name_batch(onnx_model: Any) -> None:
    """tf2onnx gives every free axis a name of its own; the first one is the batch of all."""
    for value in (*onnx_model.graph.input, *onnx_model.graph.output):
        first = value.type.tensor_type.shape.dim[:1]
        if first and not first[0].HasField("dim_value"):
            first[0].dim_param = "batch"


def _callable(tf: Any, model: Any, example: Any) -> tuple[Any, list[str]]:
    """What computes arrays by name, and the names in their order."""
    if isinstance(model, str | os.PathLike):
        loaded = tf.saved_model.load(os.fspath(model))
        served = loaded.signatures.get("serving_default")
        if served is None:
            detail = f"The SavedModel has the signatures {', '.join(loaded.signatures) or 'none'}, not serving_default."
            raise ConversionFailed("no_signature", detail, remedy="Save it with signatures={'serving_default': ...}.")
        # Through `loaded`: without it its variables would go.
        return lambda feeds: loaded.signatures["serving_default"](**feeds), list(served.structured_input_signature[1])
    names = [i.name.split(":")[0] for i in getattr(model, "inputs", None) or []]
    if not names:  # a subclass that was never built, or no Keras model at all
        names = list(example) if isinstance(example, Mapping) else ["x"]
    return lambda feeds: model(feeds if len(names) > 1 else feeds[names[0]], training=False), names
