"""When weights are trained: as the job's terms, the search and the data say. Nothing is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.domain.spec import OptimizationSpec, datasets_of
from app.errors import AppError
from app.jobs.training_admission import check_training
from tests.factories.search_world import Truth, World
from workers.artifacts import EXPORTED_PROGRAM, ONNX, TRAINING
from workers.backends.onnxruntime import OnnxRuntimeBackend
from workers.backends.openvino import OpenVinoBackend
from workers.candidates import Candidate, Case
from workers.pipeline import planner, training
from workers.pipeline.ablation import parts
from workers.search import requantized
from workers.search.requests import Done, Make
from workers.search.state import Facts, SearchState

CNN = {"Conv": 20, "Relu": 18, "Add": 8, "Gemm": 1}


def _case(mode: str, *, kinds: tuple[str, ...] = (ONNX, EXPORTED_PROGRAM), **more: Any) -> Case:
    body = {"model_id": "mdl_x", "calibration": {"dataset_id": "dst_x"}, "quantization": {"training": {"mode": mode}}}
    facts: dict[str, Any] = {"isa": ["avx512_vnni"], "cores": 2, "has_calibration": True, "same_data": True, **more}
    return Case(OptimizationSpec.model_validate(body), CNN, "cnn", kinds=kinds, **facts)


def _planned(mode: str, **more: Any) -> planner.Plan:
    return planner.plan(_case(mode, **more), {"onnxruntime": OnnxRuntimeBackend()})


def test_always_trains_every_static_configuration_behind_all_others() -> None:
    found = _planned("always")
    assert [c.id for c in found.candidates] == ["ort-int8-static", "ort-fp32", "ort-int8-static.trained"]
    made = found.candidates[-1]
    assert [s.stage for s in made.steps] == ["train"] * 5 + ["export", "simplify", "quantize"]
    assert [s.options["round"] for s in made.steps[:5]] == [1, 2, 3, 4, 5]
    assert made.steps[0].options["part"] == "calibration"
    assert "Conv" in made.steps[0].options["op_types"]
    assert made.recipe == "quantization-aware training → simplify → quantize(static_int8, minmax) → build"


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_else_the_plan_has_none(mode: str) -> None:
    assert not [c for c in _planned(mode).candidates if "trained" in c.id]


def test_an_onnx_upload_has_nothing_to_train_and_the_reason_is_said() -> None:
    found = _planned("always", kinds=(ONNX,))
    assert not [c for c in found.candidates if "trained" in c.id]
    assert "only models uploaded as .pt2" in next(s.reason for s in found.skipped if s.name == "trained weights")


def test_what_the_steps_pass_on_fits() -> None:
    """The last round gives a program, the others a state; a plug-in's stage that takes neither would be refused."""
    from workers.stages.train import Train

    steps = training.plan(_case("always")).steps
    kinds = [Train.kinds(s.options)["model"] for s in steps[:5]]
    assert kinds == [TRAINING] * 4 + [EXPORTED_PROGRAM]


def test_a_gpu_rounds_symmetrically_and_x86_without_dot_products_to_fewer_bits() -> None:
    assert training.plan(_case("always", device="cuda")).steps[0].options["activations"] == "int8"
    assert training.plan(_case("always")).steps[0].options["activations"] == "uint8"
    assert training.plan(_case("always", isa=["avx2"])).steps[0].options["reduce_range"]


def test_openvino_takes_the_ranges_that_were_trained() -> None:
    """Its own quantization would calibrate anew, and round elsewhere."""
    case = _case("always", same_data=False)
    found = planner.plan(case, {"openvino": OpenVinoBackend(), "onnxruntime": OnnxRuntimeBackend()}).candidates
    plain, trained = (next(c for c in found if c.id == cid) for cid in ("ov-int8", "ov-int8.trained"))
    assert [s.stage for s in plain.steps] == ["simplify", "quantize_nncf"]
    assert [s.stage for s in trained.steps[-3:]] == ["export", "simplify", "quantize"]
    at_ort = next(c for c in found if c.id == "ort-int8-static.trained")
    assert trained.steps == at_ort.steps, "one graph, made once"
    assert trained.steps[-1].rounding is not None


def test_trained_weights_keep_the_ranges_that_they_were_trained_with() -> None:
    plan = training.plan(_case("auto"))
    world = World({"int8": Truth(3.0)}, _spec(), 900.0)
    facts = replace(world.facts(), training=plan.steps, training_instead=plan.instead)
    (first,) = [c for c in _planned("auto").candidates if c.id == "ort-int8-static"]
    made = requantized.trained(facts, first)
    assert made is not None
    assert requantized.equalized(facts, first)
    assert requantized.calibrated_otherwise(facts, first)
    assert requantized.equalized(facts, made) == requantized.calibrated_otherwise(facts, made) == ()
    assert requantized.trained(facts, made) is None
    assert requantized.kept(made, ["conv"]).steps[-1].options["exclude_nodes"] == ["conv"]


def test_training_is_one_part_of_what_ships() -> None:
    made = _planned("always").candidates[-1]
    found = parts(made, [], {}, "onnxruntime")
    assert [p.name for p in found][:2] == ["quantization-aware training", "ONNX simplification"]
    assert found[0].stage == "train"
    assert found[0].without is not None
    assert [s.stage for s in found[0].without.steps] == ["simplify", "quantize"]


# The search


class Trained(World):
    """Trained weights lose a tenth of what the others do, and half of that with each node that they keep."""

    def facts(self) -> Facts:
        plan = training.plan(_case("auto"))
        return replace(super().facts(), training=plan.steps, training_instead=plan.instead, training_samples=500)

    def loss(self, plan: Candidate) -> float:
        if not any(s.group == training.GROUP for s in plan.steps):
            return super().loss(plan)
        kept = sum(len(s.options.get("exclude_nodes", ())) for s in plan.steps)
        return 0.1 * self.truth(plan.id).loss * 0.5**kept


def _searched(
    truths: dict[str, Truth], mode: str = "auto", seconds: float = 900.0, **terms: Any
) -> tuple[Any, SearchState, World]:
    body = {
        "model_id": "mdl_x",
        "calibration": {"dataset_id": "dst_x"},
        "quantization": {"training": {"mode": mode, **terms}},
        "budget_seconds": int(seconds),
    }
    world = Trained(truths, OptimizationSpec.model_validate(body), seconds)
    done, state = world.run()
    return done, state, world


def test_auto_trains_where_no_other_way_keeps_the_limit() -> None:
    done, _, world = _searched({"fp32": Truth(1.1), "int8": Truth(3.0, 3.0, loss=8.0, mends=1.0)})
    assert isinstance(done, Done)
    assert done.finalists[0].startswith("int8.trained")
    tried = [e["subject"]["candidate"]["id"] for e in world.asked if e["kind"] == "make"]
    assert tried.index("int8.trained") > max(i for i, cid in enumerate(tried) if ".keep" in cid)


def test_auto_does_not_train_where_nodes_kept_are_enough() -> None:
    _, state, _ = _searched({"fp32": Truth(1.1), "int8": Truth(3.0, 3.0, loss=3.0, mends=0.5)})
    assert "int8.trained" not in state.candidates


def test_nodes_of_what_was_trained_are_kept_where_it_alone_loses_too_much() -> None:
    done, state, world = _searched({"fp32": Truth(1.1), "int8": Truth(3.0, 3.0, loss=30.0, mends=1.0)})
    assert isinstance(done, Done)
    assert done.finalists[0].startswith("int8.trained.keep2")
    asked = [e for e in world.asked if e["kind"] == "rank"]
    assert [e["subject"]["candidate"]["id"] for e in asked] == ["int8", "int8.trained"], "its nodes are other ones"
    made = state.candidates["int8.trained.keep2"]
    assert made.base == "int8.trained", "its calibration serves"
    assert made.plan.steps[:6] == state.candidates["int8.trained"].plan.steps[:6]


def test_every_other_way_of_every_candidate_comes_before_training() -> None:
    """The second one is mended in seconds; then the first one is too little faster to be trained."""
    mended = Truth(2.9, 2.9, loss=3.0, mends=0.5)
    _, state, world = _searched({"fp32": Truth(1.1), "int8-a": Truth(3.0, 3.0, loss=8.0, mends=1.0), "int8-b": mended})
    assert [cid for cid in state.candidates if cid.startswith("int8-b.keep")]
    assert not [cid for cid in state.candidates if "trained" in cid]
    assert [n for n in state.candidates["int8-a"].history if "hardly faster" in str(n.get("reason"))]
    first = Truth(6.0, 6.0, loss=8.0, mends=1.0)
    _, _, world = _searched({"fp32": Truth(1.1), "int8-a": first, "int8-b": mended})
    tried = [e["subject"]["candidate"]["id"] for e in world.asked if e["kind"] == "make"]
    assert tried.index("int8-a.trained") > max(i for i, cid in enumerate(tried) if cid.startswith("int8-b.keep"))


@pytest.mark.parametrize("mode", ["off", "always"])
def test_only_auto_trains_to_win_back(mode: str) -> None:
    _, state, _ = _searched({"fp32": Truth(1.1), "int8": Truth(3.0, 3.0, loss=8.0, mends=1.0)}, mode)
    assert not [cid for cid in state.candidates if "trained" in cid]


def test_a_training_that_the_budget_does_not_hold_is_not_begun() -> None:
    truths = {"fp32": Truth(1.1), "int8": Truth(3.0, 3.0, loss=8.0, mends=1.0)}
    _, state, _ = _searched(truths, seconds=120.0, epochs=1000, max_seconds=3000)
    assert "int8.trained" not in state.candidates
    (told,) = [n for n in state.candidates["int8"].history if n["decision"] == "not trained"]
    assert "expected to take" in told["reason"]


def test_a_training_that_its_own_limit_does_not_hold_is_not_begun() -> None:
    _, state, _ = _searched({"fp32": Truth(1.1), "int8": Truth(3.0, 3.0, loss=8.0, mends=1.0)}, max_seconds=5)
    assert "int8.trained" not in state.candidates
    (told,) = [n for n in state.candidates["int8"].history if n["decision"] == "not trained"]
    assert "fewest steps" in told["reason"]


def test_a_second_candidate_starts_from_the_same_training() -> None:
    truths = {name: Truth(ratio, ratio, loss=8.0, mends=1.0) for name, ratio in (("int8-a", 3.0), ("int8-b", 2.95))}
    _, state, _ = _searched({"fp32": Truth(1.1), **truths})
    made = [state.candidates[f"{name}.trained"].plan for name in truths if f"{name}.trained" in state.candidates]
    assert made
    assert all(m.steps[:6] == made[0].steps[:6] for m in made)


def test_what_cannot_be_trained_is_not_tried_again() -> None:
    class Untrainable(Trained):
        def _make(self, request: Make) -> dict[str, Any]:
            made = super()._make(request)
            return {"failed": "not trainable"} if ".trained" in request.subject.id else made

    truths = {name: Truth(ratio, ratio, loss=8.0, mends=1.0) for name, ratio in (("int8-a", 3.0), ("int8-b", 2.95))}
    world = Untrainable({"fp32": Truth(1.1), **truths}, _spec(quantization={"training": {"mode": "auto"}}), 900.0)
    done, state = world.run()
    assert isinstance(done, Done)
    assert [cid for cid in state.candidates if "trained" in cid] == ["int8-a.trained"]
    assert [n["reason"] for n in state.candidates["int8-b"].history if n["decision"] == "not trained"]


# The request


def _spec(**changes: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "mdl_x", "calibration": {"dataset_id": "dst_c"}, **changes})


def test_defaults_are_told() -> None:
    told = _spec().model_dump()["quantization"]["training"]
    assert told == {"mode": "off", "dataset_id": None, "epochs": 20, "learning_rate": 2e-4, "max_seconds": 300}


def test_the_data_sets_of_a_job() -> None:
    spec = _spec(quantization={"training": {"dataset_id": "dst_t"}}, validation={"dataset_id": "dst_v"})
    assert datasets_of(spec.model_dump()) == {
        "/quantization/training/dataset_id": "dst_t",
        "/calibration/dataset_id": "dst_c",
        "/validation/dataset_id": "dst_v",
    }
    assert datasets_of({"model_id": "m", "quantization": {"keep_nodes": []}}) == {}


def test_training_that_cannot_be_is_refused_at_submission() -> None:
    always = {"quantization": {"training": {"mode": "always"}}}
    check_training(_spec(**always), "pt2")
    check_training(_spec(), "onnx")
    with pytest.raises(AppError) as caught:
        check_training(_spec(**always), "onnx")
    assert caught.value.errors[0].pointer == "/quantization/training/mode"
    with pytest.raises(AppError, match="calibration data"):
        check_training(OptimizationSpec.model_validate({"model_id": "mdl_x", **always}), "pt2")
