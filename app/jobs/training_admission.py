"""Whether a job's training can be done at all. Pure."""

from __future__ import annotations

from app.domain.spec import OptimizationSpec
from app.errors import FieldError, invalid_request

_TRAINED = "pt2"


def check_training(spec: OptimizationSpec, model_format: str) -> None:
    """Raise 422 where training is asked for, and the model or the data are not there for it."""
    training = spec.quantization.training
    if training.mode != "always":
        return
    pointer = "/quantization/training/mode"
    if spec.chain is not None:
        raise invalid_request(
            "A chain of models cannot be trained.",
            [FieldError(pointer, "only one model, uploaded as a .pt2 (torch.export), can be trained")],
            "Train in a job of that model alone; or use the mode 'auto' or 'off'.",
        )
    if model_format != _TRAINED:
        raise invalid_request(
            f"A model uploaded as {model_format!r} cannot be trained.",
            [FieldError(pointer, "only a .pt2 (torch.export) can be trained")],
            "Upload the model with torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2'); "
            "or use the mode 'auto'.",
        )
    if spec.calibration is None:
        raise invalid_request(
            "Training is for static int8, which needs calibration data.",
            [FieldError(pointer, "calibration names no data set")],
            "Name a data set under calibration.dataset_id.",
        )
