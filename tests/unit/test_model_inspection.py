"""What an uploaded model is, or why it is none: real files of every kind, written by the libraries that own them."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from app.errors import AppError
from app.settings import LimitSettings
from app.source_models.foreign_formats import MAKE_PT2
from app.source_models.inspect import ModelInfo, inspect_model

LIMITS = LimitSettings()


def model(
    *,
    dtype: int = TensorProto.FLOAT,
    shape: list[int | str] | None = ["batch", 4],  # noqa: B006 - read only
    weights: TensorProto | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    weights = weights or numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", dtype, shape)] if inputs is None else inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])] if outputs is None else outputs,
        [weights],
    )
    return helper.make_model(
        graph, producer_name="pytorch", producer_version="2.13", opset_imports=[helper.make_opsetid("", 17)]
    )


def external_weights(location: str = "model.onnx.data", **entries: int) -> TensorProto:
    tensor = TensorProto(name="w", dims=[4, 2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:  # type: ignore[call-overload]  # mode is a plain str here
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


PACKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "m.zip": zipped,
    "stored.zip": lambda f: zipped(f, zipfile.ZIP_STORED),
    "m.tar": tarred,
    "m.tar.gz": lambda f: tarred(f, "w:gz"),
    "m.tgz": lambda f: tarred(f, "w:gz"),
}


@pytest.fixture
def inspect(tmp_path: Path) -> Callable[..., ModelInfo]:
    def run(data: bytes | onnx.ModelProto, filename: str = "model.onnx", limits: LimitSettings = LIMITS) -> ModelInfo:
        path = tmp_path / "upload"
        path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
        return inspect_model(path, filename, limits)

    return run


Inspect = Callable[..., ModelInfo]


def refusal(
    inspect: Inspect, data: bytes | onnx.ModelProto, filename: str = "model.onnx", code: str = "invalid_model"
) -> AppError:
    with pytest.raises(AppError) as caught:
        inspect(data, filename)
    error = caught.value
    assert (error.code, error.status) == (code, 422), error
    assert error.detail
    assert error.remedy, error.detail
    json.dumps(error.members()).encode()
    return error


# --- ONNX


def test_onnx(inspect: Inspect) -> None:
    info = inspect(model())
    assert info.format == "onnx"
    assert info.inputs == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert info.outputs == [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}]
    assert (info.opset, info.producer, info.ops, info.external_data) == (17, "pytorch 2.13", {"MatMul": 1}, [])
    assert info.detail["parameters"] == 8
    json.dumps(info.detail)


@pytest.mark.parametrize("packer", PACKERS)
def test_archive_with_external_data(inspect: Inspect, packer: str) -> None:
    files = {
        "export/model.onnx": model(weights=external_weights(offset=32, length=32)).SerializeToString(),
        "export/model.onnx.data": bytes(64),
        "export/README.md": b"hello",
        "__MACOSX/export/._model.onnx": b"junk",
    }
    info = inspect(PACKERS[packer](files), packer)
    assert (info.format, info.opset, info.external_data) == ("archive", 17, ["model.onnx.data"])
    assert info.detail["model_member"] == "export/model.onnx"


def test_bare_onnx_with_external_data(inspect: Inspect) -> None:
    error = refusal(inspect, model(weights=external_weights()))
    assert error.tensor == "w"
    assert ".zip" in str(error.remedy)


@pytest.mark.parametrize("location", ["../w.data", "/etc/passwd", "a/../../w", "C:/w", "a\\w", "*/_ORT_MEM_ADDR_/*"])
def test_external_data_pointing_outside(inspect: Inspect, location: str) -> None:
    files = {"a/model.onnx": model(weights=external_weights(location)).SerializeToString(), "w.data": bytes(64)}
    error = refusal(inspect, zipped(files), "m.zip")
    assert error.tensor == "w"
    assert location[:1] in error.detail


def test_external_data_missing_or_too_short(inspect: Inspect) -> None:
    onnx_bytes = model(weights=external_weights()).SerializeToString()
    error = refusal(inspect, zipped({"model.onnx": onnx_bytes}), "m.zip")
    assert error.tensor == "w"
    assert "model.onnx.data" in error.detail
    error = refusal(inspect, zipped({"model.onnx": onnx_bytes, "model.onnx.data": bytes(31)}), "m.zip")
    assert error.tensor == "w"
    assert "31" in error.detail
    shifted = model(weights=external_weights(offset=60, length=32)).SerializeToString()
    assert refusal(inspect, zipped({"model.onnx": shifted, "model.onnx.data": bytes(64)}), "m.zip").tensor == "w"


def test_archive_with_two_models_or_none(inspect: Inspect) -> None:
    one = model().SerializeToString()
    error = refusal(inspect, zipped({"a.onnx": one, "b.onnx": one}), "m.zip")
    assert "a.onnx" in error.detail
    assert "b.onnx" in error.detail
    refusal(inspect, zipped({"a.bin": one}), "m.zip")
    refusal(inspect, zipped({}), "m.zip")
    refusal(inspect, zipped({"a.bin": b"x"}), "m.pt2")


def test_hostile_archives_keep_their_codes(inspect: Inspect) -> None:
    one = model().SerializeToString()
    refusal(inspect, zipped({"model.onnx": one, "../evil": b"x"}), "m.zip", "archive_unsafe_path")
    refusal(inspect, zipped({"model.onnx": one, "zeros": bytes(50 << 20)}), "m.zip", "archive_bomb")
    refusal(inspect, zipped({"model.onnx": one})[:-30], "m.zip", "invalid_model")
    refusal(inspect, tarred({"model.onnx": one, "data": bytes(5000)}, "w:gz")[:150], "m.tar.gz", "invalid_model")


def test_truncated_onnx(inspect: Inspect) -> None:
    data = model().SerializeToString()
    for cut in range(1, len(data)):
        refusal(inspect, data[:cut])
    refusal(inspect, zipped({"model.onnx": data[:100]}), "m.zip")


def test_inputs_that_cannot_be_served(inspect: Inspect) -> None:
    for bad, word in (
        (model(dtype=TensorProto.STRING), "strings"),
        (model(shape=None), "dynamic rank"),
        (model(dtype=TensorProto.COMPLEX64), "complex64"),
        (model(dtype=99), "unknown_99"),
        (model(inputs=[helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)]), "sequence"),
    ):
        error = refusal(inspect, bad)
        assert error.tensor == "x"
        assert word in error.detail
    assert "no inputs" in refusal(inspect, model(inputs=[])).detail
    only_weights = model(inputs=[helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2])])
    assert "no inputs" in refusal(inspect, only_weights).detail
    assert "no outputs" in refusal(inspect, model(outputs=[])).detail
    mapping = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"]))
    probabilities = helper.make_value_info("p", helper.make_sequence_type_proto(mapping))
    error = refusal(inspect, model(outputs=[probabilities]))
    assert error.tensor == "p"
    assert "zipmap" in str(error.remedy)


def test_no_operator_set(inspect: Inspect) -> None:
    bad = model()
    del bad.opset_import[:]
    assert "operator set" in refusal(inspect, bad).detail


def test_extension_must_not_contradict(inspect: Inspect) -> None:
    one = model().SerializeToString()
    for data, name in (
        (one, "m.pt2"),
        (one, "m.zip"),
        (zipped({"model.onnx": one}), "m.onnx"),
        (tarred({"m.onnx": one}), "m.pt2"),
    ):
        assert name in refusal(inspect, data, name).detail
    assert inspect(one, "no extension").format == "onnx"


# --- what is no model


def text_of(error: AppError) -> str:
    return f"{error.detail} {error.remedy}"


@pytest.mark.parametrize(
    ("data", "filename", "word"),
    [
        (b"", "model.onnx", "empty"),
        (b"hello world", "model.onnx", "text"),
        (b"<!DOCTYPE html><html>404</html>", "model.onnx", "HTML"),
        (b'<?xml version="1.0"?><net name="x">', "model.xml", "XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "model.onnx", "git lfs pull"),
        (bytes(5000), "model.onnx", "not a valid ONNX"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "model.h5", "tf2onnx"),
        (struct.pack("<Q", 40) + b'{"w":{"dtype":"F32"}}' + bytes(100), "model.safetensors", "safetensors"),
        (b"\x1c\0\0\0TFL3" + bytes(100), "model.tflite", "--tflite"),
        (b"GGUF\x03\0\0\0" + bytes(100), "model.gguf", "GGUF"),
        (b"ftrt" + bytes(100), "model.plan", "TensorRT"),
        (b"\x30\0\0\0ORTM" + bytes(100), "model.ort", "ONNX Runtime"),
        (b"\x93NUMPY\x01\0" + bytes(100), "x.npy", "/v1/datasets"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "x.7z", "7z"),
        (b"BZh91AY" + bytes(100), "x.tar.bz2", "bzip2"),
        (b"\x08\x01\x12\x04\x0a\x02\x08\x01", "saved_model.pb", "tf2onnx"),
        (zipped({"m/saved_model.pb": b"x", "m/variables/variables.index": b"x"}), "m.zip", "tf2onnx"),
        (zipped({"config.json": b"{}", "model.weights.h5": b"x"}), "m.keras", "Keras"),
        (zipped({"x.npy": b"x"}), "m.npz", "/v1/datasets"),
        (pickle.dumps({"w": [1.0]}), "model.pkl", "torch.export.export"),
        (pickle.dumps({"w": [1.0]}, protocol=2), "model.bin", "torch.export.export"),
    ],
)
def test_what_is_no_model_is_refused_with_a_remedy(inspect: Inspect, data: bytes, filename: str, word: str) -> None:
    assert word in text_of(refusal(inspect, data, filename))


# --- PyTorch


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files written by torch: a .pt2 by the very command that refusals tell, and all that is refused."""
    folder = tmp_path_factory.mktemp("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")

        class Net(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is imported at run time
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(4, 3)
                self.register_buffer("scale", torch.ones(3))

            def forward(self, ids: Any, mask: Any) -> Any:
                return self.linear(ids.float()) * self.scale, mask.sum(1), 7

        net = Net()
        torch.save(net.state_dict(), folder / "state.pt")
        torch.save(net.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "script.pt"))
        command = re.findall(r"`([^`]+)`", MAKE_PT2)[0]
        namespace = {
            "torch": torch,
            "model": net,
            "example_inputs": (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)),
        }
        exec(command.replace('"model.pt2"', repr(str(folder / "model.pt2"))), namespace)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_pt2(inspect: Inspect, torch_files: dict[str, bytes]) -> None:
    info = inspect(torch_files["model.pt2"], "model.pt2")
    batch = info.inputs[0]["shape"][0]  # type: ignore[index]  # has a shape
    assert re.fullmatch(r"s\d+", str(batch))
    assert info.format == "pt2"
    assert info.inputs == [
        {"name": "ids", "dtype": "int64", "shape": [batch, 4]},
        {"name": "mask", "dtype": "bool", "shape": [info.inputs[1]["shape"][0], 5]},  # type: ignore[index]  # has a shape
    ]
    assert [(o["dtype"], len(o["shape"] or [])) for o in info.outputs] == [("float32", 2), ("int64", 1)]
    assert info.opset is None
    assert str(info.producer).startswith("torch 2.")
    assert info.ops["aten.linear.default"] == 1
    assert info.detail["signature_read"] is True
    refusal(inspect, torch_files["model.pt2"], "model.onnx")


def graph_of(pt2: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(pt2)) as z:
        name = next(n for n in z.namelist() if n.endswith("models/model.json"))
        graph: dict[str, Any] = json.loads(z.read(name))
    return graph


def test_pt2_of_the_older_layout(inspect: Inspect, torch_files: dict[str, bytes]) -> None:
    graph = graph_of(torch_files["model.pt2"])
    old = zipped(
        {
            "version": b"8.2",
            "serialized_exported_program.json": json.dumps(graph).encode(),
            "serialized_state_dict.json": b"x",
        }
    )
    assert inspect(old, "m.pt2").inputs == inspect(torch_files["model.pt2"], "m.pt2").inputs


@pytest.mark.parametrize("bad", ["\0", "\n", "\x7f", "\ud800"])
def test_control_characters_in_the_names_of_a_pt2(inspect: Inspect, torch_files: dict[str, bytes], bad: str) -> None:
    graph = json.dumps(graph_of(torch_files["model.pt2"]))
    name = inspect(torch_files["model.pt2"], "m.pt2").inputs[0]["name"]
    changed = graph.replace(json.dumps(name), json.dumps(f"{name}{bad}"))
    assert changed != graph
    error = refusal(inspect, zipped({"m/models/model.json": changed.encode()}), "m.pt2")
    assert f"U+{ord(bad):04X}" in error.detail
    assert error.tensor == f"{name}\ufffd"


def test_pt2_that_cannot_be_read_is_not_guessed(inspect: Inspect, torch_files: dict[str, bytes]) -> None:
    def pack(graph: object) -> bytes:
        return zipped({"m/models/model.json": json.dumps(graph).encode()})

    graph = graph_of(torch_files["model.pt2"])
    for damage in (
        lambda g: g["graph_module"].pop("signature"),
        lambda g: g["graph_module"]["graph"]["tensor_values"].pop("ids"),
        lambda g: g["graph_module"]["graph"]["tensor_values"]["ids"].update(dtype=77),
        lambda g: g["graph_module"]["graph"]["tensor_values"]["ids"].update(sizes=[{"as_float": 1.0}]),
        lambda g: g.update(graph_module=[]),
    ):
        changed = json.loads(json.dumps(graph))
        damage(changed)
        info = inspect(pack(changed), "m.pt2")
        assert (info.inputs, info.outputs, info.detail["signature_read"]) == ([], [], False)
    changed = json.loads(json.dumps(graph))
    changed["graph_module"]["signature"]["input_specs"] = []
    assert "no tensor" in refusal(inspect, pack(changed), "m.pt2").detail
    for text in (b"", b"{", b"[1]", b"not json", json.dumps(graph).encode()[:-5]):
        refusal(inspect, zipped({"m/models/model.json": text}), "m.pt2")


@pytest.mark.parametrize("filler", [b"[],", b"[", b'"\\"', b'"', b"{}"])
def test_hostile_pt2_graphs_end_soon(inspect: Inspect, filler: bytes) -> None:
    text = b'{"graph_module": {"graph": {"nodes": [' + filler * ((12 << 20) // len(filler))
    started = time.monotonic()
    code = "invalid_model"
    try:
        assert inspect(zipped({"m/models/model.json": text}, zipfile.ZIP_STORED), "m.pt2").inputs == []
    except AppError as e:
        code = e.code
    assert code == "invalid_model"
    assert time.monotonic() - started < 20


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 10))
def test_damaged_pt2_graphs_never_crash(
    inspect: Inspect, torch_files: dict[str, bytes], seed: int, changes: int
) -> None:
    rng = random.Random(seed)
    text = bytearray(json.dumps(graph_of(torch_files["model.pt2"])).encode())
    for _ in range(changes):
        text[rng.randrange(len(text))] = rng.choice(b'{}[]",:\\0x')
    code = "invalid_model"
    try:
        inspect(zipped({"m/models/model.json": bytes(text)}), "m.pt2")
    except AppError as e:
        code = e.code
    assert code == "invalid_model"


@pytest.mark.parametrize(
    ("name", "what"), [("state.pt", "pickled"), ("legacy.pth", "pickled"), ("script.pt", "TorchScript")]
)
def test_pickles_and_torchscript_get_the_command(
    inspect: Inspect, torch_files: dict[str, bytes], name: str, what: str
) -> None:
    error = refusal(inspect, torch_files[name], name)
    assert what in error.detail
    assert "torch.export.save(program" in str(error.remedy)
    assert "anneal serve --with torch" in str(error.remedy)


def test_a_gigabyte_of_external_data_in_flat_memory(tmp_path: Path) -> None:
    """In its own process: a .tar with 1 GiB of data (a hole on disk) adds little to what Python takes."""
    onnx_bytes = model(weights=external_weights(length=1 << 30)).SerializeToString()
    path = tmp_path / "m.tar"
    with path.open("wb") as f:
        for name, size in (("model.onnx.data", 1 << 30), ("model.onnx", len(onnx_bytes))):
            info = tarfile.TarInfo(name)
            info.size = size
            f.write(info.tobuf(tarfile.USTAR_FORMAT))
            if name == "model.onnx":
                f.write(onnx_bytes + bytes(-len(onnx_bytes) % 512))
            else:
                f.seek(size, io.SEEK_CUR)
        f.write(bytes(1024))
    code = (
        "import resource, sys; from pathlib import Path; from app.settings import LimitSettings\n"
        "from app.source_models.inspect import inspect_model\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "info = inspect_model(Path(sys.argv[1]), 'm.tar', LimitSettings())\n"
        "assert info.external_data == ['model.onnx.data'], info\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "assert not {'numpy', 'onnx', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 10
