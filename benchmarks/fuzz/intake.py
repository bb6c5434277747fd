"""Uploads that nobody meant: real models and data sets of every kind, mutated, given to what looks into uploads.

    .venv/bin/python -m benchmarks.fuzz.intake --inputs 100000 --seed 1

Each is described or refused with a typed error. What is neither (an exception that nobody thought of, a description
that is no JSON, an answer that takes longer than five seconds) is a find: it is printed, with the input's number, and
the status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from app.datasets.inspect import describe_dataset
from app.errors import AppError
from app.settings import LimitSettings
from app.source_models.inspect import describe_model
from benchmarks.fuzz.mutate import mutated

SLOW_S = 5.0
# Small, so that what would unpack to more than that is refused and not unpacked.
LIMITS = LimitSettings(unpacked_bytes=8 << 20)
_MODEL_NAMES = ("m.onnx", "m.zip", "m.tar", "m.tar.gz", "m.pt2", "m", "m.bin", "m.tar.xz")
_DATA_NAMES = ("d.npz", "d.zip", "d.tar", "d.tar.gz", "d", "d.tar.bz2")


@dataclass
class Found:
    """`answers`: how often each code came, `taken` for what was described. `finds`: (number, seed kind, what)."""

    answers: Counter[str] = field(default_factory=Counter)
    finds: list[tuple[int, str, str]] = field(default_factory=list)
    slowest_s: float = 0.0


def fuzzed(inputs: int, seed: int, folder: Path, seconds: float = float("inf")) -> Found:
    """So many inputs, or as many as the seconds allow. `folder`: where each is laid for a moment."""
    rng = random.Random(seed)
    seeds = {"model": models(), "data set": data_sets()}
    found, path, began = Found(), folder / "input", time.monotonic()
    for number in range(inputs):
        if time.monotonic() - began > seconds:
            break
        kind = rng.choice(("model", "data set"))
        path.write_bytes(mutated(rng, seeds[kind]))
        name = rng.choice(_MODEL_NAMES if kind == "model" else _DATA_NAMES)
        start = time.perf_counter()
        answer = _answer(kind, path, name, folder)
        took = time.perf_counter() - start
        found.slowest_s = max(found.slowest_s, took)
        if took > SLOW_S:
            answer = f"! took {took:.1f} s"
        if answer.startswith("!"):
            found.finds.append((number, kind, answer))
        found.answers[answer if not answer.startswith("!") else "! find"] += 1
    return found


def _answer(kind: str, path: Path, name: str, scratch: Path) -> str:
    try:
        if kind == "model":
            told: dict[str, Any] = describe_model(path, name, LIMITS)
        else:
            told = describe_dataset(path, name, LIMITS, scratch)
        text = json.dumps(told, allow_nan=False, ensure_ascii=False)
        text.encode()
        return "! a NUL that no database takes" if "\\u0000" in text else "taken"
    except AppError as error:
        if not 400 <= error.status < 500:
            return f"! {error.status} {error.code}: {error.detail}"
        error.detail.encode()
        return error.code
    except Exception as error:
        return f"! {type(error).__name__}: {error}"


def models() -> list[bytes]:
    """A plain model, one with a subgraph and external weights, and archives of them."""
    weights = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    opset = [helper.make_opsetid("", 17)]
    plain = helper.make_model(helper.make_graph([node], "g", [x], [y], [weights]), opset_imports=opset)
    outside = TensorProto(name="w", dims=[4, 2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "m.data"), ("offset", "0"), ("length", "32")):
        outside.external_data.add(key=key, value=value)
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [y])
    either = helper.make_node("If", ["c"], ["u"], then_branch=branch, else_branch=branch)
    large = helper.make_model(helper.make_graph([node, either], "g", [x], [y], [outside]), opset_imports=opset)
    files = {"m.onnx": large.SerializeToString(), "m.data": bytes(32)}
    program = {
        "archive_format": b"pt2", "version": b"6", "byteorder": b"little",
        "models/model.json": json.dumps({"graph_module": {"graph": {"inputs": [], "outputs": []}},
                                         "schema_version": {"major": 8, "minor": 2}}).encode(),
    }  # fmt: skip
    return [
        plain.SerializeToString(),
        files["m.onnx"],
        *_archives(files),
        _zip({f"m/{k}": v for k, v in program.items()}),
    ]


def data_sets() -> list[bytes]:
    """An .npz, stored and compressed, one with several types, and archives of shards."""
    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, x=np.zeros((3, 4), np.float32))
    np.savez_compressed(packed, x=np.zeros((3, 4), np.float32), y=np.arange(3), z=np.zeros((3, 2), "<U4"))
    array = io.BytesIO()
    np.save(array, np.zeros((2, 2)))
    shards = {"a.npz": plain.getvalue(), "b.npz": plain.getvalue()}
    return [plain.getvalue(), packed.getvalue(), array.getvalue(), *_archives(shards)]


def _archives(files: dict[str, bytes]) -> list[bytes]:
    found = [
        _zip(files, kind) for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    ]
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode=mode, format=form) as packed:  # type: ignore[call-overload]
                for name, data in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    packed.addfile(info, io.BytesIO(data))
            found.append(out.getvalue())
    return found


def _zip(files: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        found = fuzzed(asked.inputs, asked.seed, Path(folder), asked.seconds)
    for answer, count in found.answers.most_common():
        print(f"{count:7} {answer}")
    print(
        f"{found.answers.total()} inputs in {time.monotonic() - began:.0f} s, the slowest {found.slowest_s:.2f} s, "
        f"{len(found.finds)} finds"
    )
    for number, kind, what in found.finds[:50]:
        print(f"input {number} ({kind}): {what[:300]}")
    return 1 if found.finds else 0


if __name__ == "__main__":
    sys.exit(main())
