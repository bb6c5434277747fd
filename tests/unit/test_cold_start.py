"""From nothing to the first answer: the server of a real bundle, in processes of its own."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.domain.failures import StageFailure
from tests.factories import onnx_models
from tests.factories.bundles import bundle
from workers.hardware import describe
from workers.kernel import StageContext, stages
from workers.pipeline import keys
from workers.pipeline.child import PipeReporter
from workers.serving import shipped
from workers.stages.cold_start import ColdStart, ColdStartOptions


@pytest.fixture
def cold(tmp_path: Path) -> Callable[..., Any]:
    def run(seconds: float = 60.0, serving: Any = None, server: bool = True, **replaced: str) -> Any:
        made = bundle(onnx_models.mlp(features=32, hidden=64), tmp_path / "made")
        _repacked(made / "m-bundle.zip", [] if server else ["serve.py"], replaced)
        ctx = StageContext(
            {"bundle": made},
            tmp_path / "work",
            tmp_path / "out",
            PipeReporter(None),
            describe(),
            time.monotonic() + seconds,
        )
        return ColdStart().run(ctx, ColdStartOptions(backend="onnxruntime", serving=serving))

    return run


def _repacked(archive: Path, without: Collection[str], replaced: Mapping[str, str]) -> None:
    with zipfile.ZipFile(archive) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    files |= shipped()
    with zipfile.ZipFile(archive, "w") as packed:
        for name, content in files.items():
            if name not in without:
                packed.writestr(name, replaced.get(name.partition(".")[0], content))


def _left() -> list[str]:
    return [p.name() for p in psutil.Process(os.getpid()).children(recursive=True) if "serve.py" in p.cmdline()]


def test_a_server_from_nothing_to_its_first_answer(cold: Callable[..., Any]) -> None:
    result = cold(serving={"instances": 2, "threads": 1})
    data = result.data
    json.dumps(data, allow_nan=False)
    assert data["starts"] == 3
    assert 0 < data["alive_seconds"] <= data["ready_seconds"] <= data["first_answer_seconds"]
    assert data["first_answer_seconds"] <= data["slowest_seconds"]
    assert data["from_zero_seconds"] == pytest.approx(data["unpack_seconds"] + data["first_answer_seconds"], abs=0.002)
    assert data["archive_mb"] > 0
    assert data["unpacked_mb"] > 0
    assert result.reusable
    assert not _left()


def test_a_bundle_without_a_server_is_told_apart(cold: Callable[..., Any]) -> None:
    with pytest.raises(StageFailure, match="no server of its own"):
        cold(server=False)


def test_a_server_that_does_not_start_says_why(cold: Callable[..., Any]) -> None:
    with pytest.raises(StageFailure, match=r"ended with 3 \(no such thing\)") as caught:
        cold(serve="import sys\nprint('no such thing', file=sys.stderr)\nsys.exit(3)\n")
    assert caught.value.code == "server_does_not_start"
    assert not caught.value.cacheable


def test_a_server_that_never_comes_is_given_up_in_time(cold: Callable[..., Any]) -> None:
    began = time.monotonic()
    with pytest.raises(StageFailure, match="was not there when the time was up"):
        cold(seconds=3, serve="import time\ntime.sleep(600)\n")
    assert time.monotonic() - began < 30
    assert not _left()


@pytest.mark.parametrize("backend", ["chained", "by-batch"])
def test_libraries_of_all_engines_in_the_bundle_are_part_of_the_key(backend: str) -> None:
    """Which these are, only the options say that they are loaded with."""
    of_all: dict[str, Any] = {"chained": {"inputs": [], "outputs": []}, "by-batch": {"input": "x", "axis": 0}}
    engines = [{"folder": f"part_{i}", "backend": "onnxruntime", "runtime": {}} for i in (1, 2)]
    if backend == "by-batch":
        engines = [{**engine, "most": most} for engine, most in zip(engines, (4, None), strict=True)]
    options = ColdStartOptions(backend=backend, runtime={**of_all[backend], "engines": engines})
    assert "onnxruntime" in keys.libraries(ColdStart, options.model_dump(mode="json"))


def test_who_is_told_a_backend_that_ships_is_told_how_it_is_loaded() -> None:
    whole = {name: stage.Options.model_fields for name, stage in stages().items() if not stage.makes_engine}
    alone = {name for name, fields in whole.items() if "backend" in fields and "runtime" not in fields}
    assert alone == {"compatibility"}, "it asks a backend for what it takes: nothing is loaded"
