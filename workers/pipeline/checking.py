"""The accuracy of the finalists, on samples that nobody chose by."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.domain.spec import OptimizationSpec
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.checks import confidence_of_a_look, looks
from workers.pipeline.evaluate import Evaluator


def confidence_of_each(spec: OptimizationSpec, finalists: Sequence[CandidateRun]) -> float:
    """How sure each look at these samples has to be. How many looks there will be is known before the first, and each
    is as much surer."""
    return confidence_of_a_look(spec, looks([(r.plan.lossless, r.tried.accuracy) for r in finalists]))


def confirm(
    spec: OptimizationSpec,
    evaluator: Evaluator,
    finalists: Sequence[CandidateRun],
    until: float,
    sure: float,
    *,
    spare: float = math.inf,
) -> None:
    """The last word on the accuracy of finalists, `sure` as `confidence_of_each` of them all says. `spare`: seconds
    that a look may take; what was checked and takes longer is not looked at again."""
    for run in finalists:
        if run.validate is not None and evaluator.expected_check_seconds(run, spec.validation.max_samples) > spare:
            run.note("final", "not confirmed", "the time left hardly holds the final measurement")
        else:
            evaluator.confirm(run, sure, until)
