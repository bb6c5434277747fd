"""The job's data sets, as its stage calls take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.db.orm import Dataset
from app.domain.artifact_key import ArtifactRef
from app.domain.shapes import ShapeRange
from app.domain.spec import OptimizationSpec
from workers.pipeline.source import dataset_ref


@dataclass
class Data:
    """The job's data as stages take it. `same`: one data set for calibration and validation, split sample by sample.
    `judging`, `calibrating`: how many samples there are for each; 0 where there are no data. `training`: what weights
    may be trained on, with so many samples that do not judge, about."""

    calibration: ArtifactRef | None
    validation: ArtifactRef | None
    same: bool
    shapes: dict[str, Any] | None
    judging: int = 0
    calibrating: int = 0
    profiles: dict[str, Any] | None = None
    training: ArtifactRef | None = None
    training_samples: int = 0

    @classmethod
    def of(cls, spec: OptimizationSpec, datasets: Mapping[str, Dataset]) -> Data:
        """`datasets`: by id."""
        calibration, validation, training = (
            datasets[i] if i else None
            for i in (
                spec.calibration.dataset_id if spec.calibration else None,
                spec.validation.dataset_id,
                spec.quantization.training.dataset_id,
            )
        )
        # One data set for both is split, sample by sample: what calibrates never judges.
        same = calibration is not None and (validation is None or _ref(validation) == _ref(calibration))
        judging, training_samples = validation or calibration, training.samples if training else 0
        calibrating = calibration.samples if calibration else 0
        return cls(
            _ref(calibration),
            _ref(judging),
            same,
            {k: v.model_dump() for k, v in spec.shapes.items()} if spec.shapes else None,
            judging.samples if judging else 0,
            calibrating,
            spanned(spec.tensorrt.profiles or ()),
            _ref(training or calibration),
            training_samples or (calibrating // 2 if same else calibrating),
        )

    @property
    def ranges(self) -> dict[str, Any] | None:
        """The sizes in use, as far as the job tells: its shapes, else what TensorRT's profiles span."""
        return self.shapes or self.profiles

    @property
    def extra(self) -> dict[str, ArtifactRef]:
        """What a step may name as `extra`, as far as it is there."""
        named = {"calibration": self.calibration, "training": self.training, "data": self.validation}
        return {name: ref for name, ref in named.items() if ref is not None}


def spanned(profiles: Sequence[Mapping[str, ShapeRange]]) -> dict[str, Any] | None:
    """The ranges that all of TensorRT's profiles span; the first one's most usual shapes."""
    found: dict[str, Any] = {}
    for name, first in (profiles[0] if profiles else {}).items():
        every = [p[name] for p in profiles if name in p and len(p[name].opt) == len(first.opt)]
        low, high = zip(*(r.min for r in every), strict=True), zip(*(r.max for r in every), strict=True)
        found[name] = {"min": [min(a) for a in low], "opt": first.opt, "max": [max(a) for a in high]}
    return found or None


def _ref(dataset: Dataset | None) -> ArtifactRef | None:
    return None if dataset is None else dataset_ref(dataset)
