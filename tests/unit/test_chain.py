"""Several models as one, and that one apart again: what goes where, what is refused, and that nothing is computed
otherwise."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper
from pydantic import ValidationError

from app.blobs.content import sha256_file
from app.db.orm import SourceModel
from app.domain.artifact_key import ArtifactRef, FileRef, digest_of
from app.domain.chain import Joined, NotJoined, join, models_of
from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec, stored
from app.jobs.report_page import report_page
from app.web.job_view import asked_for
from tests.factories import onnx_models as models
from tests.factories.bundled import packaged
from tests.factories.chains import chained, encoder, engines, head, pixels
from tests.unit.test_bundle import Notes, infer
from workers.artifacts import ONNX
from workers.candidates import Candidate, Case, Skipped, Step
from workers.graph.chaining import NotCut, cut
from workers.graph.onnx_graph import model_specs
from workers.hardware import describe
from workers.kernel import StageContext, TensorSpec, backends, stages
from workers.pipeline.chain import apart, engine_of_each
from workers.pipeline.chain import chained as join_up
from workers.pipeline.stage_calls import Outcome

Arrays = dict[str, np.ndarray[Any, Any]]


def t(name: str, *shape: Any, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": None if shape == (None,) else [*shape]}


def two(given: list[dict[str, Any]], taken: list[dict[str, Any]], connect: dict[str, str] | None = None) -> Joined:
    first = ([t("x", "batch", 8)], given)
    return join([first, (taken, [t("y", "n", 4)])], [connect])


def run(model: Path | ModelProto, feeds: Arrays) -> Arrays:
    source = str(model / "model.onnx") if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    given = session.run(None, {n: feeds[n] for n in names})
    return dict(zip([o.name for o in session.get_outputs()], given, strict=True))


def feeds(batch: int = 3) -> Arrays:
    rng = np.random.default_rng(batch)
    return {
        "input": rng.normal(size=(batch, 8)).astype(np.float32),
        "weight": rng.uniform(0.5, 1.5, size=(batch, 1)).astype(np.float32),
    }


# What goes where


def test_outputs_go_to_inputs_of_the_same_name_or_the_only_one_to_the_only_one() -> None:
    assert two([t("a", "b", 8)], [t("z", "n", 8)]).joints == [{"z": "a"}]
    found = two([t("a", "b", 8), t("e", "b", 2)], [t("e", "n", 2), t("mask", "n", 3)])
    assert found.joints == [{"e": "e"}]
    assert [i["name"] for i in found.inputs] == ["x", "mask"], "what nothing goes to is an input of the whole"
    assert found.taken == [["x"], ["mask"]]
    assert found.inputs[1]["shape"] == ["b", 3], "by the symbols of the first one"
    assert found.outputs == [t("y", "b", 4)]
    shared = two([t("a", "b", 8)], [t("z", "n", 8), t("x", "n", 8)], {"z": "a"})
    assert [i["name"] for i in shared.inputs] == ["x"], "one of the same name is one input of both"
    assert shared.taken == [["x"], ["x"]]


def test_an_output_that_is_called_as_an_input_has_another_name() -> None:
    found = join([([t("x", "n", 8)], [t("h", "n", 8)]), ([t("h", "n", 8)], [t("x", "n", 8)])], [None])
    assert found.renamed == {"x": "x_out"}
    assert [o["name"] for o in found.outputs] == ["x_out"]


def test_a_size_that_one_fixes_holds_for_all() -> None:
    found = two([t("a", "batch", 8)], [t("z", 1, 8)])
    assert found.inputs[0]["shape"] == [1, 8]
    found = two([t("a", "batch", 8)], [t("z", "n", "width"), t("m", "n", "width")], {"z": "a"})
    assert found.inputs[1]["shape"] == ["batch", 8]
    assert two([t("a", None)], [t("z", "n", 8)]).joints == [{"z": "a"}], "a shape that is not known is no fault"


@pytest.mark.parametrize(
    ("given", "taken", "connect", "words", "where"),
    [
        ([t("a", "b", 8)], [t("z", "n", 8, dtype="int64")], None, "'a' (float32 ['b', 8]) does not fit 'z'", "z"),
        ([t("a", "b", 8)], [t("z", "n", 7)], None, "on axis 1", "z"),
        ([t("a", "b", 8)], [t("z", "n", 8, 1)], None, "one has 2 axes, the other 3", "z"),
        ([t("a", "b", 8)], [t("z", "n", 8), t("x", "n", 9)], {"z": "a"}, "'x' (float32 ['batch', 8]) does not", "x"),
        ([t("a", "b", 8), t("c", "b", 7)], [t("z", "n", "w"), t("v", "n", "w")], {"z": "a", "v": "c"}, "8 and 7", "v"),
        ([t("a", "b", 8), t("c", "b", 8)], [t("z", "n", 8)], None, "no output of the first ('a', 'c')", None),
        ([t("a", "b", 8)], [t("z", "n", 8)], {"u": "a"}, "has no input 'u'; it has 'z'", "u"),
        ([t("a", "b", 8)], [t("z", "n", 8)], {"z": "u"}, "has no output 'u'; it has 'a'", "z"),
        ([t("a", "s", "s")], [t("z", 4, 5)], None, "on axis 1", "z"),
    ],
    ids=["type", "size", "rank", "shared", "twice", "unnamed", "input", "output", "square"],
)
def test_models_that_do_not_fit(given: Any, taken: Any, connect: Any, words: str, where: str | None) -> None:
    with pytest.raises(NotJoined) as caught:
        two(given, taken, connect)
    assert words in str(caught.value)
    assert (caught.value.model, caught.value.input) == (1, where)


def test_the_spec_of_a_chain() -> None:
    body: dict[str, Any] = {"model_id": "mdl_a", "chain": {"then": [{"model_id": "mdl_b"}]}}
    spec = OptimizationSpec.model_validate(body)
    assert (spec.chain is not None and spec.chain.deploy, spec.most_engines) == ("merged", 2)
    assert models_of(stored(spec)) == ["mdl_b"]
    alone = OptimizationSpec(model_id="mdl_a")
    assert "chain" not in stored(alone), "workers of the release before take what has none"
    assert models_of(stored(alone)) == []
    body["chain"]["deploy"] = "ensemble"
    assert OptimizationSpec.model_validate(body).most_engines == 1
    for change in (
        {"engines_per_bundle": 2},
        {"tensorrt": {"profiles": [{"x": {"min": [1], "opt": [1], "max": [1]}}]}},
        {"chain": {"then": []}},
        {"chain": {"then": [{"model_id": "mdl_b"}] * 4}},
        {"chain": {"then": [{"model_id": "mdl_b", "connect": {}}]}},
        {"chain": {"then": [{"model_id": "mdl_b", "connect": {"": "a"}}]}},
        {"chain": {"then": [{"model_id": "mdl_b"}], "deploy": "apart"}},
    ):
        with pytest.raises(ValidationError):
            OptimizationSpec.model_validate({**body, **change})


# One graph of them


def test_the_whole_computes_what_the_models_do_one_after_the_other(tmp_path: Path) -> None:
    first, second = encoder(), head()
    model, data = chained([first, second], tmp_path)
    between = run(first, feeds())
    wanted = run(second, {**feeds(), **between})["logits"]
    np.testing.assert_array_equal(run(model, feeds())["logits"], wanted)
    whole = onnx.load(str(model / "model.onnx"))
    onnx.checker.check_model(whole, full_check=True)
    assert [i.name for i in whole.graph.input] == ["input", "weight"]
    assert {node.name for node in whole.graph.node} == {"1/fc1", "1/act", "1/fc2", "2/weigh", "2/fc1", "2/act", "2/fc2"}
    assert whole.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert data["borders"] == [[{"name": "embedding", "dtype": "float32", "shape": ["batch", 16]}]]
    assert data["connect"] == [{"embedding": "embedding"}]


def test_three_models_of_all_kinds(tmp_path: Path) -> None:
    """Bodies that capture, local functions of one name, and names that all of them have."""
    parts = [models.with_if(), models.with_function(), models.with_loop()]
    model, data = chained(parts, tmp_path)
    x = {"input": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)}
    wanted = x
    for part in parts:
        wanted = {"input": run(part, wanted)["output"]}
    np.testing.assert_allclose(run(model, x)["output"], wanted["input"], rtol=1e-6)
    assert [[s["name"] for s in border] for border in data["borders"]] == [["output_out"], ["output_out_out"]]


def test_labels_are_the_last_model_s(tmp_path: Path) -> None:
    first, second = encoder(), head()
    for model, told in ((first, "x"), (second, '["a", "b"]')):
        helper.set_model_props(model, {"labels": told})
    model, _ = chained([first, second], tmp_path)
    assert {e.key: e.value for e in onnx.load(str(model / "model.onnx")).metadata_props} == {"labels": '["a", "b"]'}


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (encoder(), head(width=8), "Models 1 and 2 of the chain do not fit"),
        (encoder(opset=17), head(opset=18), "opsets 17, 18"),
        (models.mlp(), models.make_model([], [models.value("logits", ["n", 4])], [models.value("logits", ["n", 4])]),
         "gives its input 'logits' back"),
    ],
    ids=["size", "opset", "identity"],
)  # fmt: skip
def test_what_cannot_be_one_graph(first: ModelProto, second: ModelProto, words: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailure, match="chain_does_not_fit") as caught:
        chained([first, second], tmp_path)
    assert words in caught.value.detail
    assert caught.value.kind is FailureKind.REQUEST
    assert caught.value.remedy


# Apart again


def _spec(name: str, *shape: Any) -> TensorSpec:
    return TensorSpec(name, "float32", tuple(shape))


def test_a_graph_is_cut_where_one_model_s_outputs_go_to_the_next(tmp_path: Path) -> None:
    model, _ = chained([encoder(), head()], tmp_path)
    whole = onnx.load(str(model / "model.onnx"))
    first, second = cut(whole, [[_spec("embedding", "batch", 16)]])
    for part in (first, second):
        onnx.checker.check_model(part, full_check=True)
    assert [i.name for i in second.graph.input] == ["weight", "embedding"]
    between = run(first, feeds())
    np.testing.assert_array_equal(run(second, {**feeds(), **between})["logits"], run(whole, feeds())["logits"])
    weights = {i.name for i in first.graph.initializer}, {i.name for i in second.graph.initializer}
    assert weights == ({"1/w1", "1/b1", "1/w2", "1/b2"}, {"2/w1", "2/b1", "2/w2", "2/b2"})


def test_what_computes_sizes_may_be_in_both_and_nothing_else() -> None:
    def model(op: str) -> ModelProto:
        nodes = [
            helper.make_node(op, ["x"], ["both"], name="both"),
            helper.make_node("Cast", ["both"], ["number"], name="cast", to=1),
            helper.make_node("ReduceMax", ["number"], ["most"], name="most", keepdims=0),
            helper.make_node("Add", ["x", "most"], ["between"], name="first"),
            helper.make_node("Mul", ["between", "most"], ["y"], name="second"),
        ]
        return models.make_model(nodes, [models.value("x", ["n", 4])], [models.value("y", ["n", 4])])

    shared = model("Shape")
    with pytest.raises(NotCut, match="computes 'most' for two"):
        cut(shared, [[_spec("between", "n", 4)]])
    shared.graph.node[2].CopyFrom(helper.make_node("Gather", ["number", "place"], ["most"], name="most"))
    shared.graph.initializer.append(models.tensor("place", 0, np.int64))
    first, second = cut(shared, [[_spec("between", "n", 4)]])
    x = {"x": np.ones((2, 4), np.float32)}
    np.testing.assert_array_equal(run(second, {**x, **run(first, x)})["y"], run(shared, x)["y"])
    for border in (_spec("gone", "n", 4), _spec("x", "n", 4), _spec("y", "n", 4)):
        with pytest.raises(NotCut, match="computes"):
            cut(shared, [[border]])


# Engines of each


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_of_each_model_answer_as_the_whole_does(name: str, tmp_path: Path) -> None:
    engine, runtime = engines(name, [encoder(), head()], tmp_path)
    session = backends()["chained"]().load(engine, runtime)
    try:
        for batch in (1, 3):
            found = session.run(feeds(batch))
            np.testing.assert_allclose(
                found["logits"], run(tmp_path / "chained/model", feeds(batch))["logits"], rtol=1e-5, atol=1e-6
            )
        assert [(spec.name, spec.shape) for spec in session.inputs] == [
            ("input", ("batch", 8)),
            ("weight", ("batch", 1)),
        ]
        assert [spec.name for spec in session.outputs] == ["logits"]
        assert set(session.call(feeds())()) == {"logits"}
    finally:
        session.close()


def test_options_are_those_of_each() -> None:
    chained_backend, own = backends()["chained"](), backends()["onnxruntime"]()
    one = Candidate(
        "ort-fp32", "plain", "onnxruntime", "fp32", (Step("simplify", {}),), {"a": 1}, {"b": 2}, lossless=True
    )
    linked = one.linked("chained")
    assert (linked.backend, linked.build_options) == ("chained", {"backend": "onnxruntime", "options": {"a": 1}})
    assert linked.unlinked() == one
    assert linked.id == one.id
    case = Case(OptimizationSpec(model_id="mdl_a"), {"Gemm": 4}, "other", cores=4)
    plain = one.linked("chained").unlinked()
    found = [v.unlinked() for v in chained_backend.variants(case, linked)]
    assert found == [*own.variants(case, plain)]
    assert found, "the backend of each has variants"
    told = {"folder": "part_1", "backend": "onnxruntime", "runtime": {"intra_op_num_threads": 4}}
    runtime = {"engines": [told, {**told, "folder": "part_2"}], "inputs": [], "outputs": ["y"]}
    members = chained_backend.members({**runtime, "each": {"allow_spinning": False}})
    assert [(m.folder, m.runtime) for m in members] == [
        ("part_1", {"intra_op_num_threads": 4, "allow_spinning": False}),
        ("part_2", {"intra_op_num_threads": 4, "allow_spinning": False}),
    ]
    fewer = chained_backend.members(chained_backend.with_threads({**runtime, "each": {"allow_spinning": False}}, 1))
    assert {m.runtime["intra_op_num_threads"] for m in fewer} == {1}
    assert {m.runtime["allow_spinning"] for m in fewer} == {False}


def test_a_graph_of_another_format_is_not_cut() -> None:
    ir = Candidate("ov-int8", "int8", "openvino", "int8", (Step("quantize_nncf", {}),))
    found = apart(ir, "cpu")
    assert isinstance(found, Skipped)
    assert "format" in found.reason
    onnx_int8 = Candidate("ort-int8", "int8", "onnxruntime", "int8", (Step("simplify", {}), Step("quantize", {})))
    assert isinstance(apart(onnx_int8, "cpu"), Candidate)


def test_a_bundle_with_an_engine_of_each_runs_and_is_an_ensemble(tmp_path: Path) -> None:
    parts = [pixels(), encoder(), head()]
    engine, runtime = engines("onnxruntime", parts, tmp_path)
    made = packaged("chained", engine, runtime, tmp_path, name="chain-fp32", deployment={"serving": {"settings": {
        "instances": 1, "threads": 1, "max_batch": 8, "max_delay_ms": 2.0}}})  # fmt: skip
    folder = tmp_path / "bundle"
    with zipfile.ZipFile(made.bundle) as archive:
        archive.extractall(folder)
    done = infer(folder, "--repeat", "1")
    assert done.returncode == 0, done.stderr
    assert "the same as where it was built" in done.stdout
    assert set(made.arrays("sample_input.npz")) == {"pixels", "weight"}
    told = made.data["kinds"]["triton"]
    assert told["backend"] == "ensemble"
    assert told["notes"][0].startswith("An ensemble of chain-fp32-1, chain-fp32-2, chain-fp32-3:")
    repository = made.unpacked("triton", tmp_path / "models")
    assert {path.name for path in repository.iterdir()} == {"chain-fp32", *(f"chain-fp32-{i}" for i in (1, 2, 3))}
    config = (repository / "chain-fp32/config.pbtxt").read_text()
    assert 'platform: "ensemble"' in config
    assert "max_batch_size: 8" in config
    assert config.index('model_name: "chain-fp32-1"') < config.index('model_name: "chain-fp32-3"')
    assert "# What chain-fp32-1 gives goes to chain-fp32-2; what chain-fp32-2 gives goes to chain-fp32-3" in config
    part = (repository / "chain-fp32-3/config.pbtxt").read_text()
    assert 'name: "embedding"' in part
    assert (repository / "chain-fp32-3/1/model.onnx").exists()
    assert made.data["tried"]["largest_difference"] < 1e-5, "infer.py and serve.py were run"


# As a job does it


class Stages:
    """Runs stage calls in this process; artifacts are folders, named by their one file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.calls = folder, dict[str, Path](), list[str]()
        self.told: list[tuple[str, Mapping[str, Any]]] = []

    def put(self, source: Path) -> str:
        """A file as an upload: its digest."""
        digest = sha256_file(source)
        self.made[digest] = source
        return digest

    def run(self, stage: str, inputs: Mapping[str, ArtifactRef], options: Mapping[str, Any], **_: Any) -> Outcome:
        self.calls.append(stage)
        self.told.append((stage, options))
        home = self.folder / f"{len(self.calls)}-{stage}"
        given = {name: home / "in" / name for name in inputs}
        for name, ref in inputs.items():
            given[name].mkdir(parents=True)
            for file in ref.files:
                (given[name] / file.name).write_bytes(self.made[file.sha256].read_bytes())
        (home / "work").mkdir(parents=True)
        kind = stages()[stage]
        full = kind.Options.model_validate(dict(options))
        result = kind().run(StageContext(given, home / "work", home / "out", Notes(), describe()), full)
        outputs = {}
        for name in result.outputs:
            files = [FileRef(p.name, self.put(p), p.stat().st_size) for p in sorted((home / "out" / name).iterdir())]
            outputs[name] = ArtifactRef(tuple(files), kind.kinds(full.model_dump(mode="json")).get(name))
        told = full.model_dump(mode="json")
        key = digest_of([stage, {name: ref.digest for name, ref in inputs.items()}, told])
        return Outcome(stage, key, dict(inputs), told, outputs, dict(result.data), {}, cached=False, seconds=0.1)


OPTIONS = {"format": "onnx", "shapes": None, "batch_axes": None, "max_unpacked_bytes": 1 << 30, "max_members": 100,
           "max_ratio": 100.0}  # fmt: skip


def rows(made: Stages, parts: Sequence[ModelProto]) -> list[SourceModel]:
    found = []
    for place, part in enumerate(parts):
        path = models.save(part, made.folder / f"up-{place}" / "model.onnx")
        given, taken = model_specs(part)
        row = SourceModel(name=f"m{place}", format="onnx", filename="m.onnx", sha256=made.put(path), size_bytes=1)
        row.inputs, row.outputs = ([t(s.name, *s.shape) for s in specs] for specs in (given, taken))
        found.append(row)
    return found


def spec_of(then: int) -> OptimizationSpec:
    links = [{"model_id": f"mdl_{place}"} for place in range(then)]
    return OptimizationSpec.model_validate({"model_id": "mdl_a", "chain": {"then": links}})


def test_models_are_exported_joined_and_exported_again(tmp_path: Path) -> None:
    """Of two opsets, of which the lower one is raised; then optimized as one, cut, and built."""
    made = Stages(tmp_path)
    parts = [encoder(opset=17), head(opset=18)]
    joined = join_up(made.run, rows(made, parts), spec_of(1), OPTIONS, None)
    assert made.calls == ["export", "export", "export", "chain"]
    whole = made.run("export", {"source": joined.of_kind(ONNX)}, OPTIONS)
    assert [(i["name"], i["shape"]) for i in whole.data["inputs"]] == [
        ("input", ["batch", 8]),
        ("weight", ["batch", 1]),
    ]
    assert (whole.data["opset"], whole.data["dynamic_batch"]) == (18, True)
    simple = made.run("simplify", {"model": whole.of_kind(ONNX)}, {})
    plan = Candidate("ort-fp32", "plain", "onnxruntime", "fp32", ())
    shapes = {"input": {"min": [1, 8], "opt": [4, 8], "max": [16, 8]}}
    built = engine_of_each(made.run, joined, whole, plan, simple.of_kind(ONNX), shapes)
    told = [options["options"].get("shapes") for stage, options in made.told if stage == "build"]
    assert told == [shapes, {"embedding": {"min": [1, 16], "opt": [4, 16], "max": [16, 16]}}]
    assert {f.name for f in built.outputs["engine"].files} == {"part_1/model.onnx", "part_2/model.onnx"}
    for file in built.outputs["engine"].files:
        target = tmp_path / "engine" / file.name
        target.parent.mkdir(parents=True)
        target.write_bytes(made.made[file.sha256].read_bytes())
    session = backends()["chained"]().load(tmp_path / "engine", built.data["runtime"])
    wanted = run(parts[1], {**feeds(), **run(parts[0], feeds())})["logits"]
    np.testing.assert_allclose(session.run(feeds())["logits"], wanted, rtol=1e-5, atol=1e-6)
    session.close()


def test_a_model_is_tried_at_the_sizes_that_it_gets(tmp_path: Path) -> None:
    """What the second one leaves open it would be tried at, and fail: the first one always gives it eight."""
    nodes = [helper.make_node("Gather", ["x", "last"], ["y"], name="last", axis=1)]
    second = models.make_model(
        nodes, [models.value("x", ["n", "width"])], [models.value("y", ["n"])], [models.tensor("last", 7, np.int64)]
    )
    first = models.make_model(
        [helper.make_node("Neg", ["input"], ["x"])], [models.value("input", ["b", 8])], [models.value("x", ["b", 8])]
    )
    made = Stages(tmp_path)
    assert join_up(made.run, rows(made, [first, second]), spec_of(1), OPTIONS, None).data["connect"] == [{"x": "x"}]


def test_a_model_that_fails_is_named(tmp_path: Path) -> None:
    made = Stages(tmp_path)
    with pytest.raises(StageFailure) as caught:
        join_up(made.run, rows(made, [models.mlp(), models.shape_error()]), spec_of(1), OPTIONS, None)
    assert caught.value.detail.startswith("Model 2 of the chain (m1): ")


def test_the_page_tells_the_chain_and_escapes_its_names() -> None:
    told: dict[str, Any] = {
        "models": [
            {"name": "<b>one", "format": "onnx", "taken": ["x"], "connect": {}, "outputs": [{"name": "e"}]},
            {"name": "two", "format": "pt2", "taken": ["w"], "connect": {"z": "e"}, "outputs": [{"name": "y"}]},
        ],
        "deploy": "merged",
        "asked": "ensemble",
        "reason": "no engines <i>",
    }
    page = report_page({"analysis": {"model": "one then two"}, "chain": told}, "job_1")
    assert "The chain" in page
    assert "e → z" in page
    assert "&lt;b&gt;one" in page
    assert "no engines &lt;i&gt;." in page
    assert "What was uploaded as .pt2 became ONNX first" in page
    assert "engine for" not in page, "one engine of the whole ships"
    told["models"][1]["engine"] = {"folder": "part_2", "backend": "b<", "size_mb": 1.5, "runtime": {}}
    page = report_page({"analysis": {"model": "one then two"}, "chain": told}, "job_1")
    assert "engine for" in page
    assert "b&lt;" in page
    assert "The chain" not in report_page({"analysis": {"model": "m"}, "chain": None}, "job_1")
    assert ("Chain", "this model, then mdl_b; an engine of each") in asked_for(
        {"model_id": "mdl_a", "chain": {"then": [{"model_id": "mdl_b"}], "deploy": "ensemble"}}
    )
