"""Whatever headers tell against a data set is refused at submission, with the line that mends it; the line does."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest

from app.domain.spec import InputOptions
from app.errors import AppError
from app.jobs.data_admission import check_dataset, check_inputs

Array = numpy.ndarray[Any, Any]

PICTURES = [{"name": "x", "dtype": "float32", "shape": ["n", 3, 24, 32]}]
STATE = [
    {"name": "x", "dtype": "float32", "shape": ["batch", "t", 8]},
    {"name": "state", "dtype": "float32", "shape": [2, "batch", 16]},
]
GRAPH = [
    {"name": "x", "dtype": "float32", "shape": ["n", 8]},
    {"name": "edges", "dtype": "int64", "shape": [2, "e"]},
]
LOGITS = [{"name": "logits", "dtype": "float32", "shape": ["n", 5]}]


def described(arrays: dict[str, Array], samples: int) -> list[dict[str, Any]]:
    """As the upload describes them."""
    found = []
    for name, array in arrays.items():
        info: dict[str, Any] = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape[1:])}
        if not array.shape or array.shape[0] != samples:
            info["first_axis"] = array.shape[0] if array.shape else None
        found.append(info)
    return found


def check(arrays: dict[str, Array], inputs: list[dict[str, Any]], samples: int = 10, **options: Any) -> None:
    told = {name: InputOptions(batch_axis=axis) for name, axis in options.items()}
    check_dataset("/p", described(arrays, samples), inputs, LOGITS, samples=samples, options=told)


def refused(arrays: dict[str, Array], inputs: list[dict[str, Any]], samples: int = 10, **options: Any) -> AppError:
    with pytest.raises(AppError) as caught:
        check(arrays, inputs, samples, **options)
    assert (caught.value.code, caught.value.status) == ("invalid_request", 422)
    return caught.value


def followed(error: AppError, arrays: dict[str, Array]) -> dict[str, Array]:
    """The arrays after the line of the first error has run on them."""
    (line,) = re.findall(r"mend it with `(.*)`$", error.errors[0].message)
    saved: dict[str, Array] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

        def savez(self, _: str, *rest: Any, **named: Array) -> None:
            saved.update(named)

    names: dict[str, Any] = {n: a for n, a in arrays.items() if n.isidentifier()}
    scope = {"numpy": Recorder(), "arrays": dict(arrays), **names}
    exec(line.replace(", ...", ""), scope)
    if saved:
        return {**{n: a for n, a in arrays.items() if a is not next(iter(saved.values()))}, **saved}
    return {n: scope[n] if n in names else a for n, a in scope["arrays"].items()}


MENDED = {
    "dtype": {"x": numpy.zeros((10, 3, 24, 32), numpy.float64)},
    "channels last": {"x": numpy.zeros((10, 24, 32, 3), numpy.float32)},
    "width before height": {"x": numpy.zeros((10, 3, 32, 24), numpy.float32)},
    "samples last": {"x": numpy.zeros((3, 24, 32, 10), numpy.float32), "labels": numpy.zeros(10, numpy.int64)},
    "another name": {"image": numpy.zeros((10, 3, 24, 32), numpy.float32)},
    "labels called y": {"x": numpy.zeros((10, 3, 24, 32), numpy.float32), "y": numpy.zeros(10, numpy.int64)},
    "an array too many": {"x": numpy.zeros((10, 3, 24, 32), numpy.float32), "index": numpy.arange(10)},
    "an axis too many": {"x": numpy.zeros((10, 1, 3, 24, 32), numpy.float32)},
    "flat": {"x": numpy.zeros((10, 3 * 24 * 32), numpy.float32)},
    "class numbers as a reference": {
        "x": numpy.zeros((10, 3, 24, 32), numpy.float32),
        "logits": numpy.zeros(10, numpy.int64),
    },
}


@pytest.mark.parametrize("name", MENDED)
def test_the_line_mends_it(name: str) -> None:
    arrays = MENDED[name]
    error = refused(arrays, PICTURES)
    assert error.errors[0].pointer == "/p"
    assert error.remedy is not None
    check(followed(error, arrays), PICTURES)


def test_a_missing_channel_axis_is_put_in() -> None:
    grey = [{"name": "x", "dtype": "float32", "shape": ["n", 1, 28, 28]}]
    arrays = {"x": numpy.zeros((10, 28, 28), numpy.float32)}
    error = refused(arrays, grey)
    assert "numpy.expand_dims(x, 1)" in error.errors[0].message
    check(followed(error, arrays), grey)


def test_what_no_line_mends_is_told_all_the_same() -> None:
    error = refused({"x": numpy.zeros((10, 3, 24, 31), numpy.float32)}, PICTURES)
    assert "[samples" not in error.errors[0].message
    assert "the model takes ['samples', 3, 24, 32]" in error.errors[0].message
    assert "mend" not in error.errors[0].message


def test_names_that_are_no_identifiers() -> None:
    inputs = [{"name": "serving:0", "dtype": "float32", "shape": ["n", 4]}]
    arrays = {"serving:0": numpy.zeros((10, 4))}
    error = refused(arrays, inputs)
    assert "arrays['serving:0'].astype(numpy.float32)" in error.errors[0].message
    check(followed(error, arrays), inputs)


def test_a_state_has_its_samples_on_the_second_axis() -> None:
    x = numpy.zeros((10, 12, 8), numpy.float32)
    check({"x": x, "state": numpy.zeros((2, 10, 16), numpy.float32)}, STATE)
    arrays = {"x": x, "state": numpy.zeros((10, 2, 16), numpy.float32)}
    error = refused(arrays, STATE)
    assert "numpy.moveaxis(state, 0, 1)" in error.errors[0].message
    check(followed(error, arrays), STATE)
    refused({"x": x, "state": numpy.zeros((2, 9, 16), numpy.float32)}, STATE)


def test_sets_and_edges_are_whole_in_every_sample() -> None:
    arrays = {"x": numpy.zeros((30, 8), numpy.float32), "edges": numpy.zeros((2, 90), numpy.int64)}
    check(arrays, GRAPH, 30)
    check(arrays, GRAPH, 30, x=None, edges=None)
    refused({**arrays, "edges": numpy.zeros((3, 90), numpy.int64)}, GRAPH, 30)


def test_what_shards_do_not_share_is_not_held_against_them() -> None:
    inputs = [{"name": "ids", "dtype": "int64", "shape": ["batch", "seq"]}]
    check_dataset("/p", [{"name": "ids", "dtype": "int64", "shape": [None]}], inputs, LOGITS, samples=9)


@pytest.mark.parametrize(("name", "axis", "word"), [("y", 0, "no input 'y'"), ("state", 3, "no axis 3")])
def test_a_batch_axis_that_is_none_is_refused(name: str, axis: int, word: str) -> None:
    with pytest.raises(AppError, match=re.escape(word)) as caught:
        check_inputs({name: InputOptions(batch_axis=axis)}, STATE)
    assert caught.value.errors[0].pointer == f"/inputs/{name}/batch_axis"
    check_inputs({"state": InputOptions(batch_axis=1), "x": InputOptions(batch_axis=None)}, STATE)
